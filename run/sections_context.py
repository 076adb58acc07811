"""The sections of a report on how the context grew: the gates, what a new stage does to the experts, the distances."""

import statistics
from collections.abc import Iterable, Sequence

from data.distances import EDGES
from run.facts import RunFacts, StageFacts
from run.figures import Panel, expert_loads
from run.metrics import Row
from run.page import Picture, ReportSection, drawn, lines

SETTLING = 0.1
"""Share of a stage's rows that are taken together as its beginning, or as its end."""


def gates(facts: RunFacts) -> Iterable[ReportSection]:
    """What each gate asked, what was measured, and whether that was enough."""
    table = [_demand(row, facts) for row in facts.evals if row["task"].startswith("gate/")]
    if table:
        yield ReportSection(
            "Gate",
            "What a stage has to show at its end: enough needles found at its own length, and short text predicted as "
            "well as when it began, apart from a margin. Short text is held-out text read at the length of the stage "
            "before. A longer context that costs what the model could do before has not been extended.",
            table=table,
        )


def boundaries(facts: RunFacts) -> Iterable[ReportSection]:
    """Documents and experts stage by stage."""
    table = [_stage_in_numbers(stage, facts) for stage in facts.stages]
    table = [row for row in table if row]
    if len(table) > 1:
        yield ReportSection(
            "Stages compared",
            "A step of as many tokens holds fewer documents when rows are longer, and the load of its experts may be "
            "less even for it. Numbers with an arrow are means over the first and the last tenth of a stage. The "
            "busiest expert is given as its load over the mean load, minus 1; an entropy of 1 is an even load. Choices "
            "kept is the share of a token's experts that stay when the same weights read the same text under the "
            "stage's RoPE.",
            list(_load_by_stage(facts)),
            table,
        )


def distances(facts: RunFacts) -> Iterable[ReportSection]:
    """How often training had each distance in reach, a line a stage."""
    shares, pairs = {}, {}
    for stage in facts.stages:
        rows = [row for row in facts.metrics if row.get("distances") and facts.stage_of(row) == stage]
        if rows:
            middle, at_a_distance = _pairs_by_distance([row["distances"] for row in rows])
            tokens = statistics.fmean(row["distances"][0] for row in rows)
            trained = rows[-1]["tokens"] - stage.start_tokens
            shares[stage.name] = (middle, [count / tokens for count in at_a_distance])
            pairs[stage.name] = (middle, [count * trained / tokens for count in at_a_distance])
    if shares:
        where = "distance in tokens"
        content = [
            Panel("reach of a token", shares, "share of tokens", where, is_dotted=True, is_log_x=True, y_range=(0, 1)),
            Panel("in the whole stage", pairs, "pairs", where, is_dotted=True, is_log_x=True, is_log_y=True),
        ]
        yield ReportSection(
            "Distances trained",
            "How often a token had another one so far back in its reach: documents end before rows do, and windows "
            "close. What a model makes of a distance may go with how often it was trained on it, more than with the "
            "longest one alone. Counted in the steps that were logged; the second picture multiplies by the tokens of "
            "the stage so far.",
            [lines("how often each distance was in reach, for each stage", content, facts, 2)],
        )


def _demand(row: Row, facts: RunFacts) -> dict[str, str]:
    """One row of the gates' table."""
    stage, task = facts.stage_of(row), row["task"].removeprefix("gate/")
    score, limit, before = row["score"], row["limit"], row.get("before")
    if task == "needle":
        demand, measured = f"at least {limit:.0%} found", "none" if score is None else f"{score:.1%}"
    elif score is None or limit is None or before is None:
        demand, measured = "bits per byte", "none"
    else:
        demand = f"at most {limit - before:+.3f} bits per byte"
        measured = f"{before:.4f} → {score:.4f}, {score - before:+.4f}"
    settings = {} if stage is None else facts.config["context"]["stages"][stage.index].get("gate", {})
    verdict = "met" if row.get("is_met") else f"not met: {settings.get('action', 'warn')}"
    name, asked = stage.name if stage else "", f"{task}, length {row['length']}"
    return {"stage": name, "asked": asked, "demand": demand, "measured": measured, "verdict": verdict}


def _stage_in_numbers(stage: StageFacts, facts: RunFacts) -> dict[str, str]:
    """One row of the stages' table; nothing for a stage that has not begun."""
    rows = [row for row in facts.metrics if facts.stage_of(row) == stage]
    if not rows:
        return {}
    documents = [row["documents"] for row in rows if row.get("documents")]
    step = facts.config["context"]["stages"][stage.index].get("tokens_per_step", facts.config.get("tokens_per_step", 0))
    table = {"stage": stage.name}
    if documents:
        table["documents a step"] = f"{statistics.fmean(documents):,.0f}"
        table["tokens a document"] = f"{step / statistics.fmean(documents):,.0f}"
    for key, title in (("max_violation", "busiest expert"), ("router_entropy", "router entropy")):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            few = max(1, round(SETTLING * len(values)))
            table[title] = f"{statistics.fmean(values[:few]):.2f} → {statistics.fmean(values[-few:]):.2f}"
    dead = [row["dead_experts"] for row in rows if row.get("dead_experts") is not None]
    if dead:
        table["experts without a token"] = f"{max(dead):g} at most"
    if any("max_violation" in row for row in facts.metrics):
        shift = [
            row["score"]
            for row in facts.evals
            if row["task"].startswith("routing_shift/")
            and row["tokens"] == stage.start_tokens
            and row["score"] is not None
        ]
        table["choices kept under the new RoPE"] = f"{statistics.fmean(shift):.0%}" if shift else "–"
    return table


def _load_by_stage(facts: RunFacts) -> Iterable[Picture]:
    """For each source, the load of the experts at the end of each stage, and at its start where that was asked."""
    for task in facts.tasks("routing"):
        loads = [_load_LE([row for row in moment.rows if row["task"] == task]) for moment in facts.moments]
        titles = [moment.title.partition(" (")[0] for moment in facts.moments]
        parts = [(title, load_LE) for title, load_LE in zip(titles, loads, strict=True) if load_LE]
        source = task.partition("/")[2]
        if len(parts) > 1:
            yield drawn(f"load of each expert by layer, stage by stage, on held-out {source}", expert_loads(parts[-4:]))


def _load_LE(rows: Sequence[Row]) -> list[list[float]]:
    layers = sorted(rows, key=lambda row: row.get("layer", 0))
    return [[row[f"load_{expert}"] for expert in range(sum(key.startswith("load_") for key in row))] for row in layers]


def _pairs_by_distance(counted: Sequence[Sequence[int]]) -> tuple[list[float], list[float]]:
    """(mean distance, pairs at one such distance in a mean step) of each bucket beyond a token's own."""
    num_buckets = max(map(len, counted))
    totals = [sum(row[bucket] for row in counted if bucket < len(row)) for bucket in range(num_buckets)]
    buckets = [bucket for bucket in range(1, num_buckets) if totals[bucket]]
    middle = [(EDGES[bucket] + EDGES[bucket + 1] - 1) / 2 for bucket in buckets]
    return middle, [totals[bucket] / len(counted) / (EDGES[bucket + 1] - EDGES[bucket]) for bucket in buckets]
