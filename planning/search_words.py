"""What a search for a mesh found, as text: a table, and overrides to paste."""

import argparse
import re
from collections.abc import Iterator

from planning.device import Device
from planning.given import choose, look_at_data, what_speeds_mean
from planning.longest import FILL, Ranks
from planning.outlook import Row, table
from planning.roofline import step_floor
from planning.search import MOST_TIMED, Found, Search
from run.config import RunConfig, load_config
from run.metrics import clock, short
from run.needs import gigabytes
from settings import Refusal, to_dict

SHOWN = 5
AXES = ("replicate", "shard", "expert", "context", "tensor", "pipeline")


def plan_search(arguments: argparse.Namespace) -> Iterator[str]:
    """The fastest meshes of so many ranks, or of the fewest that fit; raises Refusal where none does."""
    numbers = numbers_of(arguments.search)
    config = load_config(arguments.config, arguments.overrides)
    vocab_size, _, _ = look_at_data(config, is_wanted=False)
    device = choose(config, arguments)
    for number in numbers:
        search = Search(config, vocab_size, number, device, Ranks(number, device).room)
        found = search.best(SHOWN)
        if found:
            break
        if len(numbers) > 1:
            yield f"{number} x {device.name}: nothing fits ({counted(search)})"
    else:
        if not (search.timed or search.too_small):
            raise Refusal(
                f"--search {arguments.search}: this configuration divides among no mesh of so many ranks"
                f" ({counted(search)}); try fewer, or larger tokens_per_step"
            )
        raise Refusal(
            f"--search {arguments.search}: nothing fits in {FILL:.0%} of {gigabytes(device.memory or 0)}"
            f" ({counted(search)}); try more ranks, --search {numbers[-1]}-{16 * numbers[-1]}, offload=true, or a"
            " smaller model"
        )
    command = [arguments.config, *arguments.overrides]
    yield f"{number} x {device.name}, fastest first: {counted(search)}"
    yield ""
    yield from table(list(rows_of(found, device)))
    yield ""
    for place, each in enumerate(found, 1):
        told = overrides_of(config, each)
        check(command, told, each)
        yield f"{place}: {' '.join(told)}"
    yield ""
    yield "Time of the whole run, as if each of a stage's steps was its longest and every row one document."
    yield from what_speeds_mean(config, device)


def numbers_of(text: str) -> list[int]:
    """`64`, or `1-64` for 1, 2, 4, ... 64."""
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise Refusal(f"--search {text}: give a number of ranks, such as 64, or a range, such as 1-64")
    numbers = [first]
    while numbers[-1] < last:
        numbers.append(min(2 * numbers[-1], last))
    return numbers


def counted(search: Search) -> str:
    """How many meshes and settings there were, and what became of them."""
    told = f"{search.meshes:,} meshes, {search.refused:,} refused, {search.too_small:,} too small for the weights"
    told += f"; {search.timed:,} settings timed, {search.too_large:,} of the fastest do not fit"
    return told + (f"; stopped at {MOST_TIMED:,}" if search.timed >= MOST_TIMED else "")


def rows_of(found: list[Found], device: Device) -> Iterator[Row]:
    """One a mesh; speeds are those of the stage that takes longest to a token."""
    for place, each in enumerate(found, 1):
        parallel, slowest = each.candidate.parallel, min(each.steps, key=lambda step: step.tokens_per_second)
        axes = {axis: getattr(parallel, axis) or 1 for axis in AXES}
        yield {
            "": f"{place}:",
            **{axis: str(length) if length > 1 else "" for axis, length in axes.items()},
            "micro-batch": short(each.candidate.tokens_per_microbatch),
            "recompute": each.candidate.recompute,
            "memory": gigabytes(each.bytes),
            "time": clock(each.seconds),
            "slowest stage: tokens a second, of a rank": short(slowest.tokens_per_second),
            "MFU": f"{slowest.utilization:.1%}",
            "limited by": step_floor(slowest, device).limit,
        }


def overrides_of(config: RunConfig, found: Found) -> list[str]:
    """What to write behind the file's name for it: what differs from the file."""
    candidate = found.candidate
    told = []
    for axis in AXES:
        new, old = getattr(candidate.parallel, axis), getattr(config.parallel, axis)
        if new != (1 if old is None and axis == "replicate" else old):
            told.append(f"parallel.{axis}={new}")
    if candidate.tokens_per_microbatch != config.tokens_per_microbatch:
        told.append(f"tokens_per_microbatch={candidate.tokens_per_microbatch}")
    if candidate.recompute != config.recompute:
        told.append(f"recompute={candidate.recompute}")
    return told


def check(command: list[str], told: list[str], found: Found) -> None:
    """That what is to be pasted is what was meant, by the way that train.py goes."""
    path, *overrides = command
    given = load_config(path, [*overrides, *told])
    ours, theirs = (to_dict(each) for each in (given.parallel, found.candidate.parallel))
    ours.setdefault("replicate", 1)
    assert ours == theirs and given.recompute == found.candidate.recompute, (told, ours, theirs)
