"""What all faults share: unbroken runs to compare with, a run that is half done, and what became of a fault."""

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.compare import differences, read
from benchmarks.faults.lives import Life, Start, last_lines, new_place, place, succeeded
from benchmarks.faults.moments import Clock, watch

EVERY_STEPS, STAGE_ENDS = 3, [12, 20]
"""Of run.toml."""
HALF = 16
"""The step after which a run is killed that is half done, once its evaluation stands there: step 15 is the newest
checkpoint, step 12 the one before."""
LAYOUTS: dict[int, list[tuple[str, ...]]] = {
    1: [()],
    2: [("parallel.expert=2",), ("parallel.shard=2",)],
    4: [("parallel.shard=4", "parallel.expert=2"), ("parallel.shard=2", "parallel.tensor=2")],
}
"""How runs lie on so many ranks: the first is what single faults are tried on, kills take each in turn."""


@dataclass
class Outcome:
    """One line of the table."""

    fault: str
    ranks: int
    tries: int
    ended: str
    """How the tries ended, in a few words."""
    problems: list[str] = field(default_factory=list)
    """What was not as promised; none of them: the fault is survived."""
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return not self.problems


class NotTried(Exception):
    """This machine lacks what it takes to bring a fault about; the message says what."""


class Bench:
    """A folder for everything, the dice, and the unbroken runs, each made when it is first asked for."""

    def __init__(self, above: Path, seed: int) -> None:
        self.above, self.dice = above, random.Random(seed)
        self._whole: dict[tuple[int, tuple[str, ...]], tuple[Start, Clock]] = {}
        self._half: dict[int, Path] = {}
        self._count = 0

    def whole(self, ranks: int, layout: Sequence[str] | None = None) -> tuple[Start, Clock]:
        """The start of the unbroken run on so many ranks, which has been watched, and how long it took for what."""
        keys = tuple(LAYOUTS[ranks][0] if layout is None else layout)
        if (ranks, keys) not in self._whole:
            start = Start(new_place(self.above, f"whole_{len(self._whole)}"), ranks, keys)
            self._whole[ranks, keys] = start, watch(start, EVERY_STEPS, STAGE_ENDS)[0]
        return self._whole[ranks, keys]

    @property
    def most_repeated(self) -> int:
        """Steps that a kill may cost: those since the last checkpoint, one of which may be being written."""
        return EVERY_STEPS

    @contextmanager
    def fresh(self, ranks: int, layout: Sequence[str] | None = None) -> Iterator[Start]:
        """A run that is not begun, in a folder that is gone afterwards."""
        whole, _ = self.whole(ranks, layout)
        self._count += 1
        with place(self.above, f"try_{self._count}") as folder:
            yield whole.at(folder)

    @contextmanager
    def half_done(self, ranks: int) -> Iterator[Start]:
        """A run that was killed in step HALF + 1, in a folder that is gone afterwards."""
        if ranks not in self._half:
            start = self.whole(ranks)[0].at(new_place(self.above, f"half_{ranks}"))
            with Life(start) as life:
                asked = start.run / "evals.jsonl"
                if not life.wait_for(lambda: any(row.get("step") == HALF for row in read(asked))):
                    raise RuntimeError(f"the run to break did not come to step {HALF}:\n{life.said}")
            self._half[ranks] = start.folder
        with self.fresh(ranks) as start:
            shutil.copytree(self._half[ranks], start.folder, dirs_exist_ok=True)
            yield start

    def go_on(self, start: Start) -> list[str]:
        """Start a broken run again, let it arrive, and compare: what is not as in the unbroken run."""
        with Life(start) as life:
            statuses = life.wait()
            if not succeeded(statuses):
                return [f"started again, it ended with {statuses}: {last_lines(life.said)}"]
        return self.compare(start)

    def compare(self, start: Start) -> list[str]:
        return differences(self.whole(start.ranks)[0].folder, start.folder)
