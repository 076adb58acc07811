"""A disk that is full: a file system in memory with a limit, mounted for one life in a namespace of its own."""

import os
import shutil
import subprocess

from benchmarks.faults.bench import Bench, NotTried, Outcome
from benchmarks.faults.cases import SAME, messages
from benchmarks.faults.lives import PATIENCE, Start, last_lines

LIMITS = {
    "before a save": "size=$((bytes + 262144))",
    "in the middle of a save": "nr_inodes=$((files + 4))",
    "in the middle of a row": "size=$((bytes + {pages} * 4096))",
}
"""What the file system may hold beside what the run has written: there is room for nothing large; for nothing more
than a part of a checkpoint's files; for a few rows at most."""
SCRIPT = """
set -e
mount -t tmpfs -o size=256m none "$1"
cp -a "$2/." "$1"
bytes=$(df --output=used --block-size=1 "$1" | tail -n 1)
files=$(df --output=iused "$1" | tail -n 1)
mount -o remount,{limit} "$1"
shift 2
status=0
(cd "$PLACE" && "$@") || status=$?
rm -rf "$BACK" && cp -a "$PLACE" "$BACK"
exit $status
"""


def disk_full(bench: Bench, ranks: int, when: str) -> Outcome:
    """A run that is half done finds the disk full: one message, nothing damaged, and with more room it goes on."""
    if not can_mount():
        raise NotTried("a file system of its own, for which it takes `unshare --user --map-root-user --mount`")
    with bench.half_done(ranks) as start:
        limit = LIMITS[when].format(pages=bench.dice.randrange(1, 12))
        ended = _run_limited(start, limit)
        said = ended.stdout.decode(errors="replace")
        expected = 2 if ranks == 1 else 1  # torchrun itself ends with 1, whatever its ranks end with
        problems = [] if ended.returncode == expected else [f"ended with {ended.returncode}: {last_lines(said)}"]
        if len(messages(said)) != 1 or not ("disk is full" in said or "No space left" in said):
            problems.append(f"{len(messages(said))} messages: {last_lines(said)}")
        if ranks == 1 and "Traceback" in said:
            problems.append(f"a traceback: {last_lines(said)}")
        problems += bench.go_on(start)
    return Outcome(f"disk full {when}", ranks, 1, f"refused, status 2; with room again, {SAME}", problems)


def can_mount() -> bool:
    """Whether this machine lets us mount a file system that only our own processes see."""
    if shutil.which("unshare") is None:
        return False
    trial = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


def _run_limited(start: Start, limit: str) -> "subprocess.CompletedProcess[bytes]":
    """Run the command in a copy of the folder that may grow no more than that; the folder is then what became of it."""
    place = start.folder.with_name(start.folder.name + "_limited")
    place.mkdir()
    inside = ["bash", "-c", SCRIPT.format(limit=limit), "bash", str(place), str(start.folder), *start.command()]
    around = {"PLACE": str(place), "BACK": str(start.folder), "PYTHONPATH": str(start.root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *inside],
        env={**os.environ, **around},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=2 * PATIENCE,
        check=False,
    )
