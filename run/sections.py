"""The sections of a report: from the rows of a run to its pictures, each with the sentence that says how to read it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from evals import heatmap
from evals.grid import Grid, make_grid
from evals.scoring import Cell
from run.facts import RunFacts
from run.figures import Panel, encode, expert_load
from run.metrics import Row, short
from run.page import Picture, ReportSection, drawn, lines
from run.sections_context import boundaries, distances, gates
from run.sections_reach import positions, reach
from run.speed import FORMULA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOE_KEYS = {
    "max_violation": "busiest expert (0: even)",
    "mean_violation": "busiest expert, mean of layers",
    "load_variation": "variation of the load",
    "balance_loss": "balance loss (1: even)",
    "router_entropy": "router entropy (1: even)",
    "dead_experts": "experts without a token",
    "router_z_loss": "router z-loss",
    "router_logit_max": "largest router logit",
    "choice_overlap": "choices kept over a step",
    "dropped_share": "share of rows dropped",
    "null_share": "share of rows to null experts",
    "bias_min": "lowest selection bias",
    "bias_max": "highest selection bias",
}
FROM_ZERO = (
    "max_violation",
    "mean_violation",
    "load_variation",
    "dead_experts",
    "router_z_loss",
    "dropped_share",
    "tokens_per_second",
    "mfu",
)


def sections_of(facts: RunFacts) -> list[ReportSection]:
    """The sections a run has numbers for, in reading order."""
    builders: tuple[Callable[[RunFacts], Iterable[ReportSection]], ...] = (
        needle,
        gates,
        reach,
        loss,
        held_out,
        positions,
        boundaries,
        distances,
        experts,
        pace,
    )
    return [section for build in builders for section in build(facts)]


def needle_grids(facts: RunFacts, task: str) -> list[Grid]:
    """One grid for the end of each stage at which the task was asked, and for its beginning where that was asked."""
    grids = []
    for snapshot in facts.moments:
        cells = [Cell.from_row(row) for row in snapshot.rows if row["task"] == task]
        if any(cell.depth is not None for cell in cells):
            trained = facts.stages[max(0, snapshot.stage.index - snapshot.is_start)].sequence_length
            grids.append(make_grid(cells, snapshot.title, trained, task=task))
    return grids


def needle(facts: RunFacts) -> Iterable[ReportSection]:
    """The needle grid at the end of each stage, side by side."""
    pictures = []
    for task in facts.tasks("needle"):
        if grids := needle_grids(facts, task):
            pictures.append(Picture(f"{task} scores by length and depth", encode(heatmap.png(grids)), is_framed=True))
    if pictures:
        yield ReportSection(
            "Needle in a haystack",
            "A key and its value are hidden in held-out text and asked for at its end. A square is the share of "
            "samples whose whole value the model reads back, by the text's length and by how deep the needle lies. The "
            "dashed line is the longest sequence trained on so far.",
            pictures,
        )


def loss(facts: RunFacts) -> Iterable[ReportSection]:
    """Training loss against tokens."""
    tokens, values = facts.column("loss")
    if tokens:
        content = [Panel("training loss", {"loss": (tokens, values)}, "nats per token", is_smoothed=True)]
        yield ReportSection(
            "Training",
            "Mean loss of a target token over a step. A dashed line is where the next stage begins: sequence length, "
            "positions and the mix of data may change there, and the loss with them.",
            [lines("training loss against tokens", content, facts)],
        )


def held_out(facts: RunFacts) -> Iterable[ReportSection]:
    """Bits per byte of held-out text against tokens, a line a length."""
    content = []
    for task in facts.tasks("held_out"):
        rows = [row for row in facts.evals if row["task"] == task]
        lengths = sorted({row["length"] for row in rows})
        series = {f"length {length}": _against_tokens(rows, length) for length in lengths}
        content.append(Panel(task.partition("/")[2] or "held out", series, "bits per byte", is_dotted=True))
    if content:
        yield ReportSection(
            "Held-out text",
            "Bits per byte of text held out of training, when the model may look back over so many tokens and no "
            "further. Where a model uses its context, the line of the longer length lies below that of the shorter.",
            [lines("bits per byte against tokens", part, facts, len(part)) for part in _in_rows(content)],
        )


def experts(facts: RunFacts) -> Iterable[ReportSection]:
    """How even the experts' load is over time, and who has it at the end."""
    content = _curves(facts, MOE_KEYS)
    pictures = [lines("balance of the experts over time", part, facts, 3) for part in _in_rows(content, 3)]
    pictures += list(_load_over_time(facts))
    pictures += list(_load_by_layer(facts))
    shift = list(_shift_by_layer(facts))
    if pictures or shift:
        text = (
            "Whether the router uses all experts. The busiest expert is given as its load over the mean load, minus 1. "
            "In squares, the colour of the page is an even share, blue is less and orange is more."
        )
        if shift:
            text += (
                " The last picture shows what the change of RoPE between two stages does by itself: the share of a "
                "token's experts that stay the same when the same model reads the same text with the next stage's RoPE."
            )
        yield ReportSection("Experts", text, pictures + shift)


def pace(facts: RunFacts) -> Iterable[ReportSection]:
    """Learning rate, gradient norm, throughput and memory against tokens."""
    titles = {
        "learning_rate": "learning rate",
        "gradient_norm": "gradient norm before clipping",
        "tokens_per_second": "tokens per second",
        "mfu": "MFU",
    }
    content = _curves(facts, titles)
    if content:
        text = f"What the optimizer was told, what it met, and how fast it went. {_worth(facts)}"
        pictures = [
            lines("schedule and speed", part, facts, len(part))
            for part in _in_rows(content, 2 if len(content) > 3 else 3)
        ]
        yield ReportSection("Schedule and speed", text.strip(), pictures)


def _worth(facts: RunFacts) -> str:
    """What stands behind the speed: how MFU is counted, against which peak, and how the model routes."""
    around = facts.environment
    told = [f"{FORMULA} Padding is the share of places in the rows where no token of the data stands."]
    if around.get("peak_flops"):
        told.append(f"Peak: {short(around['peak_flops'])} FLOP/s a rank ({around.get('peak_source') or 'no source'}).")
    told += [f"Routing: {around['routing']}."] if around.get("routing") else []
    return " ".join(told) if facts.column("mfu")[0] else ""


def _curves(facts: RunFacts, titles: Mapping[str, str]) -> list[Panel]:
    """A panel for each key of metrics.jsonl that holds numbers."""
    content = []
    for key, title in titles.items():
        tokens, values = facts.column(key)
        if any(value is not None for value in values):
            is_smoothed, y_range = key != "learning_rate", (0.0 if key in FROM_ZERO else None, None)
            counts_y = key == "tokens_per_second"
            series = {key: (tokens, values)}
            content.append(Panel(title, series, is_smoothed=is_smoothed, y_range=y_range, counts_y=counts_y))
    return content


def _load_over_time(facts: RunFacts) -> Iterable[Picture]:
    """One row of the picture for each evaluation: shares of the load by expert, mean over layers."""
    for task in facts.tasks("routing"):
        by_tokens: dict[int, list[list[float]]] = {}
        for row in facts.evals:
            if row["task"] == task:
                by_tokens.setdefault(row["tokens"], []).append(_load(row))
        if len(by_tokens) > 1:
            over_time = [
                [sum(column) / len(column) for column in zip(*layers, strict=True)] for layers in by_tokens.values()
            ]
            extent = (min(by_tokens), max(by_tokens))
            source = task.partition("/")[2]
            figure = expert_load(load_LE=over_time, y_label=f"tokens ({source})", extent=extent)
            yield drawn(f"load of each expert over time on held-out {source}, mean over layers", figure)


def _load_by_layer(facts: RunFacts) -> Iterable[Picture]:
    for source, figure in load_figures(facts.snapshots[-1].rows if facts.snapshots else []):
        yield drawn(f"load of each expert by layer on held-out {source}", figure)


def load_figures(rows: Sequence[Row]) -> Iterable[tuple[str, "Figure"]]:
    """For each source of one evaluation's rows, the load of every expert by layer."""
    for task in dict.fromkeys(row["task"] for row in rows if row["task"].startswith("routing/")):
        layers = [row for row in rows if row["task"] == task]
        load_LE = [_load(row) for row in sorted(layers, key=lambda row: row.get("layer", 0))]
        if all(load_LE):
            source = task.partition("/")[2]
            extent = (-0.5, len(load_LE) - 0.5)
            yield source, expert_load(load_LE=load_LE, y_label=f"layer ({source})", extent=extent)


def _shift_by_layer(facts: RunFacts) -> Iterable[Picture]:
    """The share of choices that the next stage's RoPE leaves as they were, a line for each stage's end."""
    for task in facts.tasks("routing_shift"):
        series = {
            snapshot.title: (
                [row["layer"] for row in snapshot.rows if row["task"] == task],
                [row["score"] for row in snapshot.rows if row["task"] == task],
            )
            for snapshot in facts.snapshots
        }
        series = {title: line for title, line in series.items() if line[0]}
        source = task.partition("/")[2]
        panel = Panel(f"choices kept under the next RoPE ({source})", series, "", "MoE layer", is_dotted=True)
        yield lines(f"choices kept at a change of RoPE, by layer, on held-out {source}", [panel], facts)


def _load(row: Row) -> list[float]:
    shares = {int(key.removeprefix("load_")): value for key, value in row.items() if key.startswith("load_")}
    return [shares[expert] for expert in sorted(shares)]


def _in_rows(content: Sequence[Panel], at_most: int = 2) -> list[Sequence[Panel]]:
    return [content[start : start + at_most] for start in range(0, len(content), at_most)]


def _against_tokens(rows: Sequence[Row], length: int) -> tuple[list[float], list[float | None]]:
    chosen = sorted((row for row in rows if row["length"] == length), key=lambda row: row["tokens"])
    return [row["tokens"] for row in chosen], [row["score"] for row in chosen]
