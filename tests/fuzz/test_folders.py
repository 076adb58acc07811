"""Whatever lies in prepared folders, checkpoints and runs, it is refused by name, passed over with a warning, or as
good as undamaged: 500 damaged folders, 100 of them by default, all with `--nightly`.

`python -m tests.fuzz.folders data 12` or `... run 12` tries one alone.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

import train  # noqa: F401 (what the forks then need not load)
from tests.fuzz.folders import Good, Harm, judge, make_run, make_shards, of_run, of_shards, try_run, try_shards
from tests.fuzz.trials import Outcome, try_all

BATCH = 10
DATA, QUICK_DATA = 170, 40
RUNS, QUICK_RUNS = 330, 60
Template = tuple[Path, Good]


def numbers(count: int, quick: int) -> list[object]:
    """The first case of each batch; those beyond the quick ones take long."""
    return [pytest.param(n, marks=[pytest.mark.nightly] if n >= quick else []) for n in range(0, count, BATCH)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """A prepared folder, and what is made of it."""
    return _made(tmp_path_factory.mktemp("shards"), make_shards, of_shards)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """A run that has come to step 9 of 12, and what is made of it, with its newest checkpoints and without."""
    return _made(tmp_path_factory.mktemp("run"), make_run, of_run)


def _made(folder: Path, make: Callable[[Path], None], tell: Callable[[Path], Good]) -> Template:
    """In a fork, as all else here: what training leaves in a process is nothing that other tests should meet."""
    outcome = try_all(lambda _: Outcome(0, good={} if make(folder) else tell(folder)), [0])[0]
    assert outcome.good and all(outcome.good.values()), (outcome.found, outcome.good)
    return folder, outcome.good


def failures(trial: Callable[[Path, int, Good], Outcome], template: Template, first: int) -> str:
    folder, good = template
    outcomes = try_all(lambda number: trial(folder, number, good), range(first, first + BATCH))
    bad = {number: outcome for number, outcome in outcomes.items() if outcome.found}
    return "\n\n".join(f"case {number} {o.out}:\n" + "\n".join(o.found) for number, o in bad.items())


@pytest.mark.parametrize("first", numbers(DATA, QUICK_DATA))
def test_damaged_shards_are_refused_by_name(first: int, shards: Template) -> None:
    found = failures(try_shards, shards, first)
    assert not found, found


@pytest.mark.parametrize("first", numbers(RUNS, QUICK_RUNS))
def test_damaged_runs_and_checkpoints_are_refused_or_passed_over(first: int, run: Template) -> None:
    found = failures(try_run, run, first)
    assert not found, found


def test_what_is_taken_for_good_is_compared() -> None:
    """Other weights under an old digest, and an older checkpoint without a word, are told; resealed ones are not."""
    good = {"resume": "ARRIVED 9 abc", "resume without (9,)": "ARRIVED 8 abd"}

    def wrong(out: str, *, is_resealed: bool = False) -> list[str]:
        return judge(Harm("", "resume", [], is_resealed), Outcome("arrived", out), good, set()).found

    assert not wrong("ARRIVED 9 abc\n")
    assert wrong("ARRIVED 9 abx\n") and not wrong("ARRIVED 9 abx\n", is_resealed=True)
    assert wrong("ARRIVED 8 abd\n") and not wrong("checkpoint step_9 is damaged and not used: x\nARRIVED 8 abd\n")
    refused = judge(Harm("", "resume"), Outcome(2, "", "refused: it went wrong\n"), good, {"manifest.json"}).found
    assert refused == ["names no file: 'refused: it went wrong\\n'"]
