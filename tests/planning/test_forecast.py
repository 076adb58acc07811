"""What a stage will compute, counted another way: key by key, step by step."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batches import Batches
from model.size import attention_layer, count, flops_per_token, mean_keys
from parallel.mesh import grid_of
from planning import forecast
from planning.device import Device
from planning.forecast import Forecast, attention_of_stage, documents_in, forecasts, pieces, whole_rows
from run.config import RunConfig, load_config
from run.needs import needs_of, share_of

TINY = Path(__file__).parents[1] / "tiny.toml"
DEVICE = Device("cpu", "one", torch.float32, peak=1e9, efficiency=0.5)
VOCAB_SIZE = 257


def write_documents() -> None:
    """Texts of a few words each, so that several share a row."""
    draws = random.Random(0)
    texts = ["".join(draws.choices("abcdefgh ", k=draws.randint(5, 60))) for _ in range(600)]
    Path("words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def tiny(*overrides: str) -> RunConfig:
    return load_config(TINY, list(overrides))


def told(*overrides: str, num_ranks: int = 1, documents_of: Any = whole_rows) -> list[Forecast]:
    return list(forecasts(tiny(*overrides), VOCAB_SIZE, num_ranks, DEVICE, documents_of))


def test_rows_of_one_document_cost_what_the_model_says() -> None:
    config = tiny()
    for each, tokens, length in zip(told(), (4096, 2048), (64, 128), strict=True):
        assert each.flops == pytest.approx(tokens * flops_per_token(config.model, VOCAB_SIZE, length))
        channels, layers = attention_layer(config.model).channels, config.model.num_layers
        assert each.attention_flops == pytest.approx(tokens * 6 * channels * layers * (length + 1) / 2)
        assert each.seconds == pytest.approx(each.flops / 0.5e9) and each.repeated_flops == 0


def test_what_is_computed_again_costs_time_and_is_no_work_of_the_model() -> None:
    plain, again = told(), told("recompute=true")
    size = count(tiny().model, VOCAB_SIZE)
    repeated = size.active - size.embedding - size.norms - 4 * 8  # two norms of heads of 8 channels in two layers
    for before, after in zip(plain, again, strict=True):
        assert after.flops == before.flops
        assert after.repeated_flops == 2 * repeated * after.stage.num_tokens
        assert after.seconds == pytest.approx((after.flops + after.repeated_flops) / 0.5e9)


def test_ranks_share_the_time_and_each_has_its_part_of_the_memory() -> None:
    one, two = told("tokens_per_microbatch=128"), told("tokens_per_microbatch=128", num_ranks=2)
    for alone, both in zip(one, two, strict=True):
        (sent,) = (part for part in both.step.parts if part.is_sent)
        added_up = both.stage.num_steps * sent.exposed
        assert sent.name == "replicate" and both.num_rows == alone.num_rows
        assert both.seconds == pytest.approx(alone.seconds / 2 + added_up)
    first, second = told("tokens_per_microbatch=128", "context.stages.1.context=2", num_ranks=2)
    assert (first.row_ranks, second.row_ranks) == (1, 2)
    assert second.needed.residual < 0.6 * first.needed.residual and second.needed.exchange > 0


@pytest.mark.parametrize("own", [None, 5])
@pytest.mark.parametrize("window", [None, 3, 9])
def test_documents_are_counted_key_by_key(own: int | None, window: int | None) -> None:
    draws = random.Random(0)
    documents = tuple(draws.randint(1, 40) for _ in range(20))
    pattern = () if own is None else (f"model.attention.window={own}", "model.pattern=['window', 'full']")
    config = tiny(*pattern)
    keys = 0
    for layer in range(2):
        sees = [w for w in (config.model.window(layer), window) if w is not None]
        keys += sum(min([place + 1, *sees]) for length in documents for place in range(length))
    expected = 6 * attention_layer(config.model).channels * keys / sum(documents)

    class Fixed:
        num_steps, longest = 1, 40

        def step(self, number: int) -> Any:
            return type("Step", (), {"sequence_length": 40, "window": window})

    assert attention_of_stage(config, Fixed(), documents) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "growth",
    ["{kind = 'linear', start = 32, granularity = 32}", "{kind = 'window', start = 8, rate = 16.0}"],
)
def test_where_length_or_window_changes_every_step_counts_as_it_is(growth: str) -> None:
    config = tiny("tokens_per_microbatch=512", f"context.stages.1.growth={growth}")
    stage = config.stages[1]
    steps = [stage.step(number) for number in range(stage.num_steps)]
    assert len({(step.sequence_length, step.window) for step in steps}) > 1
    channels, layers = attention_layer(config.model).channels, config.model.num_layers
    expected = sum(mean_keys(step.sequence_length, step.window) for step in steps) / len(steps)
    ours = attention_of_stage(config, stage, tuple(whole_rows(stage)))
    assert ours == pytest.approx(6 * channels * layers * expected)


def test_of_many_steps_some_are_looked_at_all_over_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(
        "tokens_per_step=128", "tokens_per_microbatch=128", "context.stages.1.growth={kind = 'window', rate = 6.0}"
    )
    whole = attention_of_stage(config, config.stages[1], (128,))
    monkeypatch.setattr(forecast, "SAMPLED_STEPS", 8)
    assert attention_of_stage(config, config.stages[1], (128,)) == pytest.approx(whole, rel=0.1)


def test_documents_longer_than_a_row_are_cut() -> None:
    assert pieces((10, 4, 3), 4) == [4, 4, 2, 4, 3]
    assert pieces((7,), 7) == [7] and pieces((7,), 100) == [7]


def test_documents_are_those_of_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_documents()
    texts = "data.sources.words.path=words.jsonl"
    config = tiny(texts)
    batches = Batches(config.data, seed=config.seed)
    documents_of = documents_in(batches, config)
    documents = [documents_of(stage) for stage in config.stages]
    assert [sum(lengths) for lengths in documents] == [256, 256] and len(documents[0]) > 4
    less = told(documents_of=documents_of)[0].attention_flops
    assert less < told()[0].attention_flops
    unmasked = tiny(texts, "context.stages.0.has_document_mask=false")
    assert documents_in(batches, unmasked)(unmasked.stages[0]) == (64,) * 4


def test_a_rank_is_given_its_part_of_a_micro_batch() -> None:
    cut = ("context.stages.1.context=2", "parallel.expert=2", "tokens_per_microbatch=128")
    config = tiny(*cut, "recompute=true", "loss_chunk=100")
    steps, device = [stage.longest_step() for stage in config.stages], Device("cpu", "any", torch.bfloat16, 1.0)
    first, second = (share_of(config, step, grid_of(config.parallel, 4), device.numbers) for step in steps)
    assert (first.num_tokens, second.num_tokens) == (128, 64) and (first.row_ranks, second.row_ranks) == (1, 2)
    for share in (first, second):
        assert share.numbers.itemsize == 2 and share.numbers.device == "cpu" and share.recompute == "ops"
        assert (share.loss_chunk, share.num_ranks, share.expert_ranks) == (100, 4, 2)
        assert share.methods == ("groupcast",)
    needed = [needs_of(config, VOCAB_SIZE, step, 4, device.numbers) for step in steps]
    assert needed == [each.needed for each in forecasts(config, VOCAB_SIZE, 4, device, whole_rows)]
