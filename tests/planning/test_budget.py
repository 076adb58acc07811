"""What to train for a budget: the laws' own optimum, shapes that keep their proportions, and hours that turn back."""

import math
from pathlib import Path

import pytest

import plan
from model.size import count
from planning.budget import Budget, budget_of, for_hours, sized, with_tokens
from planning.budget_words import in_words, overrides_of
from planning.device import published
from planning.resize import resized
from run.config import load_config
from scaling.repeats import worth
from scaling.sets import SETS, advise, coefficient_set
from settings import Refusal, to_dict

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parents[1] / "tiny.toml"
BYTES = "data.tokenizer={kind='byte'}"
EPOCH, H200 = coefficient_set("epoch"), published("h200")


def printed(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    plan.main(plan.parse_arguments(list(given)))
    return capsys.readouterr().out


def test_chinchillas_own_budget_gives_its_ratio() -> None:
    found = budget_of(5.76e23, EPOCH)
    assert 15 < found.tokens / found.parameters < 25 and 6e10 < found.parameters < 8.5e10
    assert 6 * found.parameters * found.tokens == pytest.approx(5.76e23)
    for name in SETS:
        told, own = budget_of(1e21, SETS[name]), advise(1e21, SETS[name])
        assert (told.parameters, told.tokens, told.loss) == (own.parameters, own.tokens, own.loss)
        assert (told.batch_tokens, told.epochs) == (own.batch_tokens, 1.0)


def test_tokens_that_are_few_are_seen_again_and_the_model_grows() -> None:
    fresh = budget_of(1e21, EPOCH)
    assert budget_of(1e21, EPOCH, fresh.tokens * 1.01).parameters == fresh.parameters, "enough of them"
    last = fresh
    for share in (0.5, 0.1, 0.02):
        found = budget_of(1e21, EPOCH, unique=share * fresh.tokens)
        assert found.parameters > last.parameters and found.loss > last.loss and found.epochs > last.epochs
        assert 6 * found.parameters * found.tokens == pytest.approx(1e21)
        assert found.loss == pytest.approx(EPOCH.loss(found.parameters, worth(share * fresh.tokens, found.epochs)))
        for by in (0.99, 1.01):
            tokens = found.tokens / by
            beside = EPOCH.loss(by * found.parameters, worth(share * fresh.tokens, tokens / (share * fresh.tokens)))
            assert found.loss < beside
        last = found


@pytest.mark.parametrize("name", ["moe_1b", "quickstart_dense", "moe_1b_32k"])
@pytest.mark.parametrize("active", [4e8, 3e9, 2e10])
def test_a_shape_keeps_its_proportions(name: str, active: float) -> None:
    pattern = load_config(ROOT / "configs" / f"{name}.toml", []).model
    model = resized(pattern, 257, active)
    assert abs(math.log(count(model, 257).active / active)) < 0.1
    assert 0.5 < (model.width / model.num_layers) / (pattern.width / pattern.num_layers) < 2
    assert model.width * pattern.attention.num_heads == pattern.width * model.attention.num_heads
    before, after = pattern.attention, model.attention
    assert before.kind == after.kind == "grouped"
    assert before.num_heads * after.num_kv_heads == before.num_kv_heads * after.num_heads  # type: ignore[union-attr]
    if pattern.moe is not None and model.moe is not None:
        assert model.moe.num_experts == pattern.moe.num_experts
        assert model.moe.expert_width / model.width == pytest.approx(pattern.moe.expert_width / pattern.width, rel=0.1)
    assert bool(model.num_dense_layers) == bool(pattern.num_dense_layers)


def test_the_pattern_itself_comes_back_and_what_cannot_be_is_refused() -> None:
    pattern = load_config(ROOT / "configs" / "moe_1b.toml", []).model
    assert resized(pattern, 257, count(pattern, 257).active) == pattern
    for active in (1e3, 1e16):
        with pytest.raises(Refusal, match="no model of this shape has about"):
            resized(pattern, 257, active)


def test_a_run_of_a_budget_has_its_tokens_in_whole_steps() -> None:
    config = load_config(TINY, [])
    budget = Budget(6e13, 1e6, 1e7, 1.0)
    found = sized(config, 257, budget, 2, H200)
    given = found.config
    assert given.total_tokens == pytest.approx(1e7, rel=0.01) and given.total_tokens % given.tokens_per_step == 0
    assert given.tokens_per_step == pytest.approx(budget.batch_tokens, rel=0.1)
    ends = [stage.until_tokens / given.total_tokens for stage in given.stages]
    assert ends == pytest.approx([4096 / 6144, 1.0], rel=0.01)
    assert given.evals.every_tokens == pytest.approx(2048 / 6144 * 1e7, rel=0.01)
    assert found.seconds > 0 and found.size.active == pytest.approx(1e6, rel=0.1)
    alone = sized(config, 257, budget, 1, H200)
    assert alone.flops == pytest.approx(found.flops, rel=0.01) and found.seconds < alone.seconds


def test_every_stage_keeps_a_step() -> None:
    table = with_tokens(to_dict(load_config(TINY, [])), 600, 512)
    assert [stage["until_tokens"] for stage in table["context"]["stages"]] == [512, 1024]
    assert table["total_tokens"] == 1024


def test_hours_turn_back_into_the_same_budget() -> None:
    config = load_config(TINY, [])

    def seconds(flops: float) -> float:
        return sized(config, 257, budget_of(flops, EPOCH), 1, H200).seconds

    for flops in (3e16,):
        back = for_hours(seconds(flops), flops / 20, seconds)
        assert seconds(back) == pytest.approx(seconds(flops), rel=0.05)
    assert for_hours(10.0, 1.0, lambda flops: flops**1.2) == pytest.approx(10 ** (1 / 1.2), rel=0.01)


def test_hours_without_a_pattern_are_those_of_a_share_of_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "--hours", "24", "--ranks", "8", "--device", "h200")
    assert f"{24 * 3600 * 8 * 0.4 * 989e12:.3g} FLOPs, 6ND, by the set 'epoch'" in said and "Besiroglu" in said
    assert "FLOPs" in printed(capsys, "--hours", "1", "--rate", "1e12") and "1e+12" not in said
    with pytest.raises(Refusal, match="--hours: give --device"):
        printed(capsys, "--hours", "1")


@pytest.mark.parametrize("flops", [1e17, 1e20, 1e25])
def test_what_lies_beyond_the_fitted_runs_is_said(flops: float) -> None:
    said = "\n".join(in_words(budget_of(flops, EPOCH), EPOCH))
    beyond = {1e17: "14 times below", 1e20: "", 1e25: "769 times above"}[flops]
    assert (beyond in said) and ("the law was fitted" in said) == (flops != 1e20)
    assert ("batch and rate were fitted" in said) == (flops != 1e20)
    assert "Step Law: Li et al. 2025" in said


def test_the_set_moves_the_answer_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = {name: printed(capsys, "--flops", "5.76e23", "--coefficients", name) for name in SETS}
    ratios = {name: float(text.split(" a parameter;")[0].split()[-1]) for name, text in said.items()}
    assert 15 < ratios["epoch"] < 25 < ratios["hoffmann"] < ratios["hoffmann_rounded"]
    assert all(f"by the set '{name}'" in text for name, text in said.items())
    few = printed(capsys, "--flops", "1e21", "--unique-tokens", "2e9")
    assert "passes over 2B tokens, worth" in few and "Muennighoff" in few


def test_what_is_printed_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, str(TINY), "--flops", "1e17", "--device", "h100", "--ranks", "2")
    assert "The sets are of dense models" in said and "of its own" in said and "MFU:" in said
    line = next(line for line in said.splitlines() if line.startswith("optimizer.learning_rate="))
    config = load_config(TINY, line.split())
    budget = budget_of(1e17, EPOCH)
    assert count(config.model, 257).active == pytest.approx(budget.parameters, rel=0.1)
    assert config.total_tokens == pytest.approx(budget.tokens, rel=0.01)
    pasted = sized(load_config(TINY, []), 257, budget, 2, published("h100")).config
    assert to_dict(config.model) == to_dict(pasted.model)
    assert overrides_of(config, config, 1.0) == ["optimizer.learning_rate=1.00e+00"]
    assert config.tokens_per_step == pasted.tokens_per_step and config.context == pasted.context
