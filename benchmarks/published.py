"""Predicted against published speed: `python -m benchmarks.published [--parts NAME]`.

Rows and what is known of their set-up are in published.toml; no constant is chosen for a row alone.
"""

import argparse
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.transformer import ModelSettings
from moe.words import routing_in_words
from parallel.cost import Link
from parallel.mesh import ParallelSettings, grid_of
from planning.device import Ceilings, Device, published
from planning.device_file import FOLDER, DeviceSettings
from planning.outlook import seconds, table
from planning.speeds import Framework, Repeats
from planning.step_parts import Job, StepTime
from planning.step_time import step_time
from run.needs import gigabytes
from settings import load, validate

FILE = Path(__file__).parent / "published.toml"
NEAR = 0.25
LESS_POWER = (500 / 700) ** (1 / 3)
"""Of the clock, where an H100 may take 500 W of 700: power grows with the third power of the clock."""
H100 = published("h100")
H100_500W = replace(
    H100,
    name="h100_500w",
    peak=LESS_POWER * H100.peak,
    memory_bandwidth=2.4e12,
    ceilings=Ceilings(LESS_POWER * H100.best.product, 2.4e12, "of an H100, at the clock of 500 W"),
)
DEVICES = {each.name: each for each in (published("a100"), H100, H100_500W)}
CARD = load(FOLDER / "h100.toml", [], DeviceSettings).links.across.reached
"""The share of its speed that a row's own card reaches."""


@dataclass(frozen=True)
class Comparison:
    """A published run and what we say of it."""

    row: dict[str, Any]
    predicted: StepTime
    routing: str = ""
    """In words; published rows force an even load. Their rows are full: no padding."""

    @property
    def error(self) -> float:
        """Predicted over published step time, less 1: above 0, the run was faster than we say."""
        return self.row["tokens_per_second"] / self.predicted.tokens_per_second - 1

    @property
    def is_near(self) -> bool:
        return abs(self.error) <= NEAR

    @property
    def is_held_out(self) -> bool:
        return bool(self.row["use"] == "held out")


def comparisons(path: Path = FILE) -> Iterator[Comparison]:
    """Every row of the file."""
    told = tomllib.loads(path.read_text(encoding="utf-8"))
    for row in told["rows"]:
        model = {key: value for key, value in told["models"][row["model"]].items() if key != "vocab_size"}
        routing = routing_in_words(validate(model, ModelSettings, row["model"]).moe)
        yield Comparison(row, predict(row, told), routing)


def predict(row: dict[str, Any], told: dict[str, Any]) -> StepTime:
    """The step of one row."""
    given = dict(told["models"][row["model"]])
    vocab_size = given.pop("vocab_size")
    settings = validate(row["parallel"], ParallelSettings, row["name"])
    job = Job(
        model=validate(given, ModelSettings, row["model"]),
        vocab_size=vocab_size,
        grid=grid_of(settings, row["ranks"]),
        tokens=row["rows"] * row["length"],
        microbatches=row["microbatches"],
        lengths=(row["length"],),
        repeats=Repeats(**told["recompute"][row["recompute"]]),
        schedule=row.get("schedule", "1f1b"),
        parts=row.get("parts", 1),
    )
    return step_time(job, device_of(row), Framework(**told["frameworks"][row["framework"]]))


def device_of(row: dict[str, Any]) -> Device:
    """The row's device, with the network card that the row names."""
    device = DEVICES[row["device"]]
    if "card" not in row:
        return device
    card = Link(row["card"] * CARD, device.links.across.latency)
    return replace(device, links=replace(device.links, across=card))


def shown(each: Comparison) -> dict[str, str]:
    row = each.row
    return {
        "run": row["name"],
        "published": f"{row['tokens_per_second']:,}",
        "predicted": f"{each.predicted.tokens_per_second:,.0f}",
        "step time": f"{each.error:+.0%}",
        "MFU": f"{each.predicted.utilization:.0%}",
        "routing": each.routing.replace("learned", "even"),
        "exposed": f"{sent_share(each.predicted):.0%}",
        "": "" if each.is_held_out else "calibration",
    }


def sent_share(step: StepTime) -> float:
    """How much of a step a rank waits for others."""
    return sum(part.exposed for part in step.parts if part.is_sent or "waiting" in part.name) / step.seconds


def parts_of(each: Comparison) -> list[dict[str, str]]:
    """What the predicted step is made of."""
    return [
        {
            each.row["name"]: part.name,
            "exposed": seconds(part.exposed),
            "hidden": seconds(part.hidden) if part.hidden else "",
            "sent": gigabytes(part.sent) if part.is_sent else "",
        }
        for part in each.predicted.parts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", metavar="NAME", help="the parts of the steps of rows with this in their name")
    arguments = parser.parse_args()
    every = list(comparisons())
    if arguments.parts:
        for each in (each for each in every if arguments.parts in each.row["name"]):
            print(*table(parts_of(each)), sep="\n")
        return
    print(*table([shown(each) for each in every]), sep="\n")
    held = [each.is_near for each in every if each.is_held_out]
    near = sum(each.is_near for each in every)
    print(f"\nwithin {NEAR:.0%}: {near} of {len(every)}, of those held out {sum(held)} of {len(held)}")


if __name__ == "__main__":
    main()
