"""Whatever stands in a configuration, it loads or is refused by name: 2,000 damaged ones, and all bounds.

300 of them and a part of the bounds by default, all with `--nightly`. A case is a function of its number:
`python -m tests.fuzz.configs 123` tries that one and says what came of it.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

import compare  # noqa: F401 (what the forks then need not load)
import train  # noqa: F401
from parallel.mesh import ParallelSettings, grid_of
from run.config import RunConfig, load_config
from settings import Refusal, read
from tests.fuzz.configs import judged, keys_of, known, lay_out, try_made
from tests.fuzz.mutations import ROOT, TINY, Case, case, of_table, told
from tests.fuzz.named import NAMED
from tests.fuzz.schema import numbers
from tests.fuzz.suggestions import suggestions
from tests.fuzz.trials import Outcome, try_all
from tests.fuzz.verdicts import wrong_with_message

ALL, BATCH = 2000, 50
QUICK = 300


def bounds() -> list[Case]:
    """Every number of the schema at its bounds, beside them and far beyond."""
    table = copy.deepcopy(read(TINY, []))
    return [of_table(whole, [told(path, number)]) for path, whole, number in numbers(RunConfig, table, Random(0))]


def failures(cases: dict[int, Case]) -> str:
    """What is wrong with each that is not refused or loaded as it should."""
    outcomes = try_all(lambda number: try_made(cases[number]), list(cases))
    bad = {number: outcome for number, outcome in outcomes.items() if outcome.found}
    return "\n\n".join(f"case {n} {cases[n].label} {cases[n].done}:\n" + "\n".join(o.found) for n, o in bad.items())


@pytest.mark.parametrize(
    "first",
    [pytest.param(n, marks=[pytest.mark.nightly] if n >= QUICK else []) for n in range(0, ALL, BATCH)],
)
def test_damaged_configurations_load_or_are_refused_by_name(first: int) -> None:
    found = failures({number: case(number) for number in range(first, first + BATCH)})
    assert not found, found


@pytest.mark.parametrize(
    "part", [pytest.param(n, marks=[pytest.mark.nightly] if n else []) for n in range(20)]
)  # fmt: skip
def test_numbers_at_their_bounds_load_or_are_refused_by_name(part: int) -> None:
    made = dict(enumerate(bounds()))
    assert len(made) > 1500, "the schema is walked whole"
    found = failures({number: each for number, each in made.items() if number % 20 == part})
    assert not found, found


@pytest.mark.parametrize("name", NAMED)
def test_what_was_found_stays_mended(name: str) -> None:
    found = failures({0: NAMED[name]})
    assert not found, found


def test_the_command_itself_refuses_and_shows(tmp_path: Path) -> None:
    """A few cases through a process of their own: what the fork tries is what a person meets."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seen = set()
    for number in (1, 4, 15, 27):
        made, folder = case(number), tmp_path / str(number)
        folder.mkdir()
        before = Path.cwd()
        os.chdir(folder)
        try:
            lay_out(made)
        finally:
            os.chdir(before)
        script = str(ROOT / f"{made.door}.py")
        words = [sys.executable, script, *(os.fsencode(word) for word in made.words), "--show"]
        ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        outcome = judged(made, Outcome(ended.returncode, ended.stdout, ended.stderr))
        assert not outcome.found, (number, made.done, outcome.found)
        seen.add(ended.returncode)
    assert seen == {0, 2}


def test_the_cases_are_always_the_same() -> None:
    assert case(5) == case(5) and case(5) != case(6)
    assert case(1).files[case(1).words[0]]


def test_a_message_is_judged() -> None:
    """What judges refuses messages that name nothing, tracebacks, and letters that a terminal obeys."""
    known_keys = known()
    assert not wrong_with_message('refused: a.toml: optimizer.clip="x": Input should be a number\n', known_keys)
    for bad in (
        "refused: something is wrong\n",
        "optimizer.clip=1: no\n",
        "refused: a.toml: optimizer.clip=1\nTraceback (most recent call last)\n",
        "refused: a.toml: seed=\x1b[31m1: no\n",
        "refused: seed=1: no\nrefused: seed=2: no\n",
        f"refused: seed={'9' * 3000}: no\n",
    ):
        assert wrong_with_message(bad, known_keys), bad
    assert keys_of(case(1))


def test_suggestions_are_read_out_of_messages() -> None:
    def read_out(line: str) -> list[str]:
        return list(suggestions(f"refused: case.toml: {line}"))

    assert read_out("seed=3 must be even; try seed=2 or seed=4") == ["seed=2", "seed=4"]
    assert read_out("model: attention.num_heads=3 must divide width=16; try 2 or 4") == [
        "model.attention.num_heads=2", "model.attention.num_heads=4",
    ]  # fmt: skip
    assert read_out("context.stages.0.growth: start=3 is odd; try 4, or leave it out") == [
        "context.stages.0.growth.start=4"
    ]


def test_impossible_grids_are_refused_with_ways_out_that_are_possible() -> None:
    """Each way out is tried: so many ranks, or another value of a key."""
    rng, refused = Random("grids"), 0
    for _ in range(3000):
        names = rng.sample(["shard", "expert", "context", "tensor", "pipeline", "replicate"], rng.randrange(1, 5))
        chosen = {name: rng.choice([1, 2, 3, 4, 5, 6, 8, 12, 16, 64, 65_536]) for name in names}
        settings, size = ParallelSettings(**chosen), rng.choice([1, 2, 3, 4, 6, 8, 12, 24, 64, 96, 1024])
        try:
            grid_of(settings, size)
        except Refusal as refusal:
            refused += 1
            told_ways = str(refusal)
            assert any(f"parallel.{name}={value}" in told_ways for name, value in chosen.items()), told_ways
            _take(told_ways, settings, size)
    assert refused > 1000


def _take(told_ways: str, settings: ParallelSettings, size: int) -> None:
    """The grid that one of the ways out leads to; the refusal comes again where it leads nowhere."""
    start = re.search(r"start (\d+) of them", told_ways)
    if "set nothing for parallel.replicate" in told_ways:
        settings = settings.model_copy(update={"replicate": None})
    changes = re.findall(r"set parallel\.(\w+)=(\d+)", told_ways)
    is_joint = "set nothing for" in told_ways
    if is_joint:
        update = {key: int(value) for key, value in changes}
        assert start is not None
        grid_of(settings.model_copy(update=update), int(start[1]))
        return
    assert start or changes or "leave parallel." in told_ways, told_ways
    if start:
        grid_of(settings, int(start[1]))
    for key, value in changes:
        grid_of(settings.model_copy(update={key: int(value)}), size)
    for key in re.findall(r"leave parallel\.(\w+) out", told_ways):
        grid_of(settings.model_copy(update={key: None}), size)


@pytest.mark.parametrize(
    "override",
    [
        "tokens_per_step=1", "tokens_per_step=500", "tokens_per_microbatch=1", "tokens_per_microbatch=100",
        "tokens_per_microbatch=1000000", "context.stages.1.sequence_length=127", "context.stages.0.sequence_length=512",
        "total_tokens=5000", "context.stages.1.until_tokens=8192", "context.stages.1.tokens_per_step=100",
    ],
)  # fmt: skip
def test_numbers_of_tokens_that_do_not_divide_are_refused_with_ones_that_do(override: str) -> None:
    with pytest.raises(Refusal) as refusal:
        load_config(TINY, [override])
    offered = list(suggestions(f"refused: {refusal.value}"))
    assert offered, refusal.value
    for suggestion in offered:
        load_config(TINY, [override, suggestion])
