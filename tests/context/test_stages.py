"""Stages: where they begin and end, what a step reads, and what is refused with numbers."""

import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from context.gate import GateSettings
from context.growth import PowerOfTwoGrowth, WindowGrowth
from context.lengths import nearest_divisors
from context.rotary import DefaultRotary, YarnRotary
from context.shares import shares_of_tokens
from context.stages import ContextSettings, Continue, Rewarm, Stages, StageSettings
from data.buckets import Bucket
from data.positions import Pose
from settings import Refusal

plain = DefaultRotary(base=1e4)
STEP = 1024
# A busy machine is no failure.
patient = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def stage(until: int, length: int = 128, **more) -> StageSettings:
    return StageSettings(until_tokens=until, sequence_length=length, rotary=plain, **more)


def test_a_stage_begins_at_the_step_boundary_at_or_after_the_last_ones_end() -> None:
    stages = Stages([stage(2500), stage(4096, 512), stage(4097, 1024)], STEP)
    assert [(s.start_tokens, s.until_tokens) for s in stages] == [(0, 3072), (3072, 4096), (4096, 5120)]
    assert [stages.at(tokens).index for tokens in (0, 2048, 3071, 3072, 4095, 4096, 5119, 5120, 10**9)] == [
        0, 0, 0, 1, 1, 2, 2, 2, 2,
    ]  # fmt: skip
    assert [stage.until_tokens for stage in stages] == [3072, 4096, 5120]
    assert stages.total_tokens == 5120 and len(stages) == 3 and stages[1].sequence_length == 512


def test_first_sample_counts_the_samples_of_the_stage() -> None:
    stages = Stages([stage(2048), stage(4096, 512)], STEP)
    assert [stages.step(tokens).first_sample for tokens in (0, 1024, 2048, 3072, 4096)] == [0, 8, 0, 2, 4]
    with pytest.raises(Refusal, match="tokens=1000 is not at a step boundary: steps take 1024"):
        stages.step(1000)
    with pytest.raises(Refusal, match="tokens=-1024"):
        stages.step(-1024)


@patient
@given(st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from([64, 128, 256])), min_size=1, max_size=5))
def test_every_step_reads_the_samples_after_the_last_steps(plan: list[tuple[int, int]]) -> None:
    ends = sorted({-(-until // 4096) for until, _ in plan})
    assume(len(ends) == len(plan))
    stages = Stages([stage(end * 4096, length) for end, (_, length) in zip(ends, plan, strict=True)], 4096)
    seen = dict.fromkeys(range(len(plan)), 0)
    for tokens in range(0, stages.total_tokens, 4096):
        now = stages.at(tokens)
        assert stages.step(tokens).first_sample == seen[now.index]
        seen[now.index] += 4096 // now.sequence_length
    assert [seen[s.index] * s.sequence_length for s in stages] == [s.num_tokens for s in stages]


def test_rewarm_goes_up_to_the_peak_and_down_to_its_share() -> None:
    rate = Rewarm(peak=1e-3, warmup_tokens=2048, final=0.25)
    first, second = Stages([stage(4096), stage(4096 + 10240, learning_rate=rate)], STEP)
    assert first.learning_rate(1024) is None and first.settings.learning_rate == Continue()
    rates = [second.learning_rate(tokens) for tokens in range(5120, second.until_tokens + 1, STEP)]
    assert rates[0] == pytest.approx(5e-4) and max(rates) == rates[1] == pytest.approx(1e-3)
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] == pytest.approx(2.5e-4)
    assert second.learning_rate(4096 + 2048 + 4096) == pytest.approx(1e-3 * 0.625)


@pytest.mark.parametrize("final", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_every_shape_begins_at_its_peak_and_ends_at_its_share(shape: str, final: float) -> None:
    rate = Rewarm(peak=2e-3, warmup_tokens=2 * STEP, final=final, shape=shape)
    (stage_,) = Stages([stage(10 * STEP, learning_rate=rate)], STEP)
    rates = [stage_.learning_rate(tokens * STEP) for tokens in range(1, 11)]
    assert rates[:2] == [1e-3, 2e-3]
    assert rates[-1] == pytest.approx(2e-3 * (1.0 if shape == "constant" else final), abs=1e-18)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    half = {"cosine": 0.5, "linear": 0.5, "constant": 1.0}[shape]
    assert rates[5] == pytest.approx(2e-3 * (final + (1 - final) * half))
    quarter = {"cosine": 0.5 + 0.5 * math.cos(math.pi / 4), "linear": 0.75, "constant": 1.0}[shape]
    assert rates[3] == pytest.approx(2e-3 * (final + (1 - final) * quarter))
    (cold,) = Stages([stage(10 * STEP, learning_rate=Rewarm(peak=2e-3, warmup_tokens=0, shape=shape, final=0.5))], STEP)
    assert cold.learning_rate(0) == 2e-3, "without a warm-up the stage begins at its peak"


def test_a_stage_may_have_steps_of_its_own() -> None:
    """The next one begins where its last whole step ends, whatever its own steps are."""
    stages = Stages([stage(2000), stage(5000, 512, tokens_per_step=1536), stage(5700, tokens_per_step=128)], STEP)
    assert [(s.start_tokens, s.until_tokens, s.num_steps) for s in stages] == [
        (0, 2048, 2), (2048, 5120, 2), (5120, 5760, 5),
    ]  # fmt: skip
    step = stages.step(2048 + 1536)
    assert (step.num_tokens, step.num_samples, step.first_sample, step.end_tokens) == (1536, 3, 3, 5120)
    assert step.is_last_of_stage and not step.is_first_of_stage and stages.step(2048).is_first_of_stage
    assert [stages.last_step(tokens).start_tokens for tokens in (0, 1024, 2048, 3584, 5120, 5248)] == [
        0, 0, 1024, 2048, 3584, 5120,
    ]  # fmt: skip
    with pytest.raises(
        Refusal, match=r"stages\.1\.sequence_length=512 must divide context\.stages\.1\.tokens_per_step=800"
    ):
        Stages([stage(2048), stage(5000, 512, tokens_per_step=800)], STEP)


@patient
@given(
    st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 10), min_size=1),
    st.fixed_dictionaries({name: st.floats(1, 1e6) for name in "abc"}),
)
def test_shares_of_documents_become_shares_of_their_tokens(shares: dict[str, float], means: dict[str, float]) -> None:
    """Drawing documents by their shares gives tokens by these; said twice or in other sizes it is the same."""
    tokens = shares_of_tokens(shares, means)
    assert sum(tokens.values()) == pytest.approx(1) and tokens.keys() == shares.keys()
    documents = {name: share / means[name] for name, share in tokens.items()}
    total = sum(documents.values())
    assert all(documents[n] / total == pytest.approx(shares[n] / sum(shares.values())) for n in shares)
    alike = shares_of_tokens(shares, dict.fromkeys("abc", 77.0))
    assert alike == pytest.approx({name: share / sum(shares.values()) for name, share in shares.items()})


def test_a_source_without_documents_has_no_share_of_them() -> None:
    assert shares_of_tokens({"a": 1.0, "b": 0.0}, {"a": 5.0, "b": 0.0}) == {"a": 1.0, "b": 0.0}
    with pytest.raises(ValueError, match=r"mixture\.b: the source has no documents; leave it out"):
        shares_of_tokens({"a": 1.0, "b": 0.5}, {"a": 5.0, "b": 0.0})
    with pytest.raises(ValidationError, match="mixture_unit='documents' is the unit of a mixture, but there is none"):
        stage(200, mixture_unit="documents")


def test_rows_tell_what_is_rare_where_some_stage_has_it() -> None:
    rare = stage(
        10 * STEP,
        512,
        growth=PowerOfTwoGrowth(shortest=128, cycles=1),
        moments="reset",
        mixture={"code": 2.0},
        mixture_unit="documents",
        buckets={"code": (Bucket(from_tokens=2048, share=0.25),)},
        pack="concat",
        has_document_mask=False,
        positions=Pose(reach=4096),
        context=2,
        gate=GateSettings(needle=0.9),
    )
    window = stage(20 * STEP, 512, growth=WindowGrowth(start=100, rate=10.0))
    plain_row, row, last = Stages([stage(4 * STEP), rare, window], STEP).rows()
    told = {
        "growth": "power_of_two over 128, 256, 512",
        "moments": "reset",
        "mixture": "code 2 of documents",
        "buckets": "code 0.25 of 2,048 tokens or more",
        "packing": "concat",
        "document mask": "none",
        "positions": "pose reach=4,096",
        "ranks a row": "2",
        "gate": "needle=0.9",
    }
    assert {title: row[title] for title in told} == told
    assert all(plain_row[title] == "-" for title in told if title != "mixture")
    assert last["growth"] == "window 100 to 190" and plain_row.keys() == row.keys() == last.keys()
    assert "growth" not in Stages([stage(4 * STEP)], STEP).rows()[0]
    (wide,) = Stages([stage(60 * STEP, 512, growth=WindowGrowth(start=100, rate=10.0))], STEP).rows()
    assert wide["growth"] == "window 100 to all"


def test_rows_tell_the_plan() -> None:
    yarn = YarnRotary(base=1e4, factor=4, original_length=128)
    long = StageSettings(until_tokens=4096, sequence_length=512, rotary=yarn, mixture={"code": 0.7, "recall": 0.3})
    rows = Stages([stage(2048), long], STEP).rows()
    assert rows[0]["tokens"] == "0 to 2,048" and rows[0]["rotary"] == "default base=10000"
    assert rows[1] == {
        "stage": "1",
        "tokens": "2,048 to 4,096",
        "steps": "2",
        "tokens a step": "1,024",
        "sequence length": "512",
        "samples a step": "2",
        "rotary": "yarn base=10000 factor=4 original_length=128",
        "learning rate": "continue",
        "mixture": "code 0.7, recall 0.3",
    }


@patient
@given(st.integers(1, 5000), st.integers(1, 6000))
def test_nearest_divisors(number: int, value: int) -> None:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = nearest_divisors(number, value)
    assert below == max((d for d in divisors if d < value), default=None)
    assert above == min((d for d in divisors if d > value), default=None)


@pytest.mark.parametrize(
    ("settings", "step", "words"),
    [
        (
            [stage(4096), stage(8192, 3000)],
            65536,
            r"context\.stages\.1\.sequence_length=3000 must divide tokens_per_step=65536; "
            r"try sequence_length 2048 or 4096$",
        ),
        ([stage(4096, 2048)], 1024, r"try sequence_length 1024$"),
        (
            [stage(4000), stage(4090)],
            1024,
            r"stages\.1\.until_tokens=4090 leaves the stage no step: it begins at 4096 tokens .* end it later",
        ),
        (
            [stage(4096, learning_rate=Rewarm(peak=1e-3, warmup_tokens=4096))],
            1024,
            r"stages\.0\.learning_rate\.warmup_tokens=4096 must be below the stage's 4096 tokens; try 409$",
        ),
        ([], 1024, "stages is empty"),
        ([stage(4096)], 0, "tokens_per_step=0"),
    ],
)
def test_plans_that_cannot_be_are_refused(settings: list[StageSettings], step: int, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        Stages(settings, step)


def test_settings_refuse_what_cannot_be() -> None:
    with pytest.raises(ValidationError, match=r"stages\.1\.until_tokens=100 must be above stages\.0\.until_tokens=200"):
        ContextSettings(stages=(stage(200), stage(100)))
    with pytest.raises(ValidationError, match=r"mixture\.web\s+Input should be greater than or equal to 0"):
        stage(200, mixture={"web": -0.5})
    with pytest.raises(ValidationError, match="every source the share 0"):
        stage(200, mixture={"web": 0.0})
    assert ContextSettings(stages=(stage(100), stage(200))).stages[1].until_tokens == 200


def test_a_new_rotary_takes_over_where_a_stage_with_another_one_begins() -> None:
    yarn = YarnRotary(base=1e4, factor=2.0, original_length=128)
    other = StageSettings(until_tokens=6144, sequence_length=256, rotary=yarn)
    stages = Stages([stage(2048), stage(4096), other], STEP)
    assert [stages.new_rotary(tokens) for tokens in (0, 2048, 3072, 4096, 6144)] == [None, None, None, yarn, None]
