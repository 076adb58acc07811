"""Faults one by one: signals, lost and stalled ranks, damaged files, changed sources, arithmetic that goes wrong."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.bench import HALF, Bench, Outcome
from benchmarks.faults.lives import ROOT, Life, Start, known, last_lines, succeeded
from benchmarks.faults.moments import last_step, newest_checkpoint

SAME = "the same losses"
STALL, STALLED = 10, 60.0
"""Seconds after which a rank counts as one that stands still, and within which the others must have ended."""


def refusal(life: Life, *words: str) -> list[str]:
    """What is wrong with the end of a life that should be one message, with these words, and exit status 2."""
    statuses, said = life.wait(), life.said
    lines = messages(said)
    problems = [] if 2 in statuses and None not in statuses else [f"ended with {statuses}, not 2: {last_lines(said)}"]
    if len(lines) != 1:
        problems.append(f"{len(lines)} messages: {last_lines(said)}")
    if "Traceback" in said:
        problems.append(f"a traceback: {last_lines(said)}")
    return problems + [f"the message does not name {word}: {lines}" for word in words if word not in "".join(lines)]


def messages(said: str) -> list[str]:
    """The different refusals among what ranks have said: all that refuse say so, as the others may not know."""
    return sorted({line.partition("refused: ")[2] for line in said.splitlines() if "refused: " in line})


def stopped(bench: Bench, ranks: int, number: int) -> Outcome:
    """SIGTERM or SIGINT to all ranks: the step is finished and saved, status 0, and the same command goes on."""
    with bench.fresh(ranks) as start:
        with Life(start) as life:
            life.wait_for(lambda: last_step(start.run) >= 10)
            life.send(number)
            problems = [] if succeeded(life.wait()) else [f"ended with {life.statuses()}: {last_lines(life.said)}"]
            step = last_step(start.run)
            if newest_checkpoint(start.run) != step or f"stopped after step {step};" not in life.said:
                problems.append(f"step {step} is not saved, or it was not said: {last_lines(life.said)}")
        problems += bench.go_on(start)
    return Outcome(signal.Signals(number).name, ranks, 1, f"saved, status 0, then {SAME}", problems)


def stopped_torchrun(bench: Bench, ranks: int) -> Outcome:
    """SIGTERM to torchrun, as a scheduler sends it: the ranks save before torchrun ends."""
    with bench.fresh(ranks) as start:
        with Life(start.cold()) as life:
            life.wait_for(lambda: last_step(start.run) >= 10)
            assert life.command is not None
            life.send(signal.SIGTERM, life.command.pid)
            life.wait()
            step = last_step(start.run)
            is_saved = newest_checkpoint(start.run) == step
            problems = [] if is_saved else [f"step {step} is not saved: {last_lines(life.said)}"]
        problems += bench.go_on(start)
    return Outcome("SIGTERM to torchrun", ranks, 1, f"saved, then {SAME}", problems)


def lost_rank(bench: Bench, ranks: int, restarts: int) -> Outcome:
    """One rank is killed under torchrun, which ends the others; it starts them again itself where it may."""
    fault = f"one rank killed, torchrun --max-restarts={restarts}"
    with bench.fresh(ranks) as start:
        with Life(start.cold(f"--max-restarts={restarts}")) as life:
            life.wait_for(lambda: last_step(start.run) >= 10)
            life.send(signal.SIGKILL, bench.dice.choice(life.pids()))
            statuses, said = life.wait(), life.said
        if restarts:
            problems = [] if succeeded(statuses) else [f"ended with {statuses}: {last_lines(said)}"]
            problems += bench.compare(start)
        else:
            problems = [f"ended with {statuses}"] if succeeded(statuses) or None in statuses else []
            problems += bench.go_on(start)
    return Outcome(fault, ranks, 1, SAME if restarts else f"all ranks end; started again, {SAME}", problems)


def stalled_rank(bench: Bench, ranks: int) -> Outcome:
    """One rank stands still (SIGSTOP): the others must not wait for ever, and say where they stood."""
    with bench.half_done(ranks) as start:
        patience = (*known(f"watchdog.seconds={STALL}"), *known(f"watchdog.slow_seconds={2 * STALL}"))
        with Life(start.with_keys(*patience)) as life:
            life.wait_for(lambda: last_step(start.run) > HALF)
            still = bench.dice.choice(life.pids())
            life.send(signal.SIGSTOP, still)
            life.wait_for(lambda: life.pids() == [still], STALLED)
            problems = [] if life.pids() == [still] else [f"ranks still wait after {STALLED:.0f} s"]
        stacks = start.run / "stacks"
        if not any("train.py" in path.read_text() for path in stacks.glob("*")):
            problems.append(f"nothing says where the ranks stood: {last_lines(life.said)}")
        shutil.rmtree(stacks, ignore_errors=True)
        problems += bench.go_on(start)
    return Outcome("a rank stalls", ranks, 1, f"the others end and leave their stacks; then {SAME}", problems)


def damaged(bench: Bench, ranks: int, kind: str, *, every_file: bool) -> Outcome:
    """A file of the newest checkpoint is damaged, each in turn or one of them: the one before is taken, by name."""
    problems: list[str] = []
    with bench.half_done(ranks) as start:
        names = [path.relative_to(newest(start)) for path in sorted(newest(start).rglob("*")) if path.is_file()]
    names = names if every_file else bench.dice.sample(names, 1)
    for name in names:
        with bench.half_done(ranks) as start:
            folder = newest(start)
            DAMAGE[kind](bench, folder / name)
            found = bench.go_on(start)
            said = start.folder.with_suffix(".log").read_text()
            if f"{folder.name} is damaged" not in said:
                found.append(f"nobody said that it is damaged: {last_lines(said)}")
        problems += [f"{name}: {line}" for line in found]
    return Outcome(f"a checkpoint's file {kind}", ranks, len(names), f"passed over by name, {SAME}", problems)


def all_damaged(bench: Bench, ranks: int) -> Outcome:
    """No checkpoint is whole: nothing is trained, and nothing is removed."""
    with bench.half_done(ranks) as start:
        for folder in newest(start).parent.glob("step_*"):
            _flip(bench, max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size))
        kept = sorted(start.run.rglob("*"))
        with Life(start) as life:
            problems = refusal(life, "none of the")
        if sorted(start.run.rglob("*")) != kept:
            problems.append("files came or went")
    return Outcome("every checkpoint damaged", ranks, 1, "refused, status 2", problems)


def torn_rows(bench: Bench, ranks: int) -> Outcome:
    """The last row is cut short and zeros follow, as after a power cut."""
    with bench.half_done(ranks) as start:
        for name in ("metrics.jsonl", "evals.jsonl"):
            rows = start.run / name
            rows.write_bytes(rows.read_bytes()[: -bench.dice.randrange(2, 60)] + bytes(100))
        problems = bench.go_on(start)
    return Outcome("the last rows torn", ranks, 1, SAME, problems)


def other_text(bench: Bench, ranks: int) -> Outcome:
    """A source of the data has another first letter."""
    with bench.half_done(ranks) as start:
        kept, text = start.text.with_name("kept.txt"), start.text.read_text()
        start.text.rename(kept)
        start.text.write_text(("b" if text[0] != "b" else "c") + text[1:])
        try:
            with Life(start) as life:
                problems = refusal(life, "data has changed", "words")
        finally:
            kept.replace(start.text)
        shutil.rmtree(start.folder / "prepared")  # where the other text lies prepared beside the first
        problems += bench.go_on(start)
    return Outcome("a source of data changed", ranks, 1, f"refused, status 2; put back, {SAME}", problems)


def other_code(bench: Bench, ranks: int) -> Outcome:
    """A source file of the project has changed: that is allowed, and environment.json tells it."""
    with bench.fresh(ranks) as start:
        start = start.cold(root=_copy_of_the_project(start.folder.parent / "project"))
        with Life(start) as life:
            life.wait_for(lambda: last_step(start.run) >= HALF)
        with (start.root / "optim" / "groups.py").open("a") as file:
            file.write("# changed\n")
        problems = bench.go_on(start)
        around = json.loads((start.run / "environment.json").read_text())
        if not any(restart.get("commit", "").endswith("+") for restart in around.get("restarts", [])):
            problems.append(f"environment.json does not tell that the source has changed: {around}")
        shutil.rmtree(start.root)
    return Outcome("a source file changed", ranks, 1, f"told in environment.json, {SAME}", problems)


def taken_folder(bench: Bench, ranks: int) -> Outcome:
    """A second process starts in the folder of a run that is going on."""
    with bench.half_done(ranks) as start, Life(start) as life:
        life.wait_for(lambda: last_step(start.run) > HALF)
        life.send(signal.SIGSTOP)
        with Life(start, start.folder.with_suffix(".second.log")) as second:
            problems = refusal(second, "another process is training in this folder")
        life.send(signal.SIGCONT)
        problems += [] if succeeded(life.wait()) else [f"the first one ended with {life.statuses()}: {life.said}"]
        problems += bench.compare(start)
    return Outcome("a second process in the folder", ranks, 1, f"the second refused, the first {SAME}", problems)


def newest(start: Start) -> Path:
    """The folder of the newest checkpoint."""
    return start.run / "checkpoints" / f"step_{newest_checkpoint(start.run):08d}"


def _truncate(bench: Bench, path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(bench.dice.randrange(path.stat().st_size))


def _flip(bench: Bench, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[bench.dice.randrange(len(content))] ^= 1 << bench.dice.randrange(8)
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Bench, Path], None]] = {
    "cut short": _truncate,
    "with one bit turned": _flip,
    "gone": lambda bench, path: path.unlink(),
}


def _copy_of_the_project(place: Path) -> Path:
    """The source in a repository of its own, with one commit."""
    unwanted = shutil.ignore_patterns(".*", "runs", "prepared", "tests", "docs", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, place, ignore=unwanted)
    someone = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for words in (["init", "--quiet"], ["add", "."], [*someone, "commit", "--quiet", "--message", "as it was"]):
        subprocess.run(["git", "-C", str(place), *words], check=True, capture_output=True)
    return place
