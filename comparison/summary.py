"""Arms side by side: what they are, what they took, what is left unlike, and where their settings differ."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from comparison.difference import Difference
from comparison.estimate import estimate
from comparison.measures import headline
from comparison.pooled import differing, every, leaves
from comparison.seen import SeenRun, arms_of
from run.metrics import clock, short

UNKNOWN = "–"
TOLD_FROM = 0.005
"""Share by which arms must be apart for it to be told."""
Number = Callable[[SeenRun], float | None]


def _share(value: float) -> str:
    return f"{value:.1%}"


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


NUMBERS: Mapping[str, tuple[Number, Callable[[float], str]]] = {
    "parameters": (lambda run: run.parameters.get("total"), short),
    "active for each token": (lambda run: run.parameters.get("active"), short),
    "FLOPs a token": (lambda run: run.mean_flops, short),
    "tokens": (lambda run: run.tokens, short),
    "FLOPs": (lambda run: run.end.flops if run.end else None, short),
    "training time": (lambda run: run.end.seconds if run.end else None, clock),
    "tokens a second": (lambda run: run.median("tokens_per_second"), short),
    "MFU": (lambda run: run.median("mfu"), _share),
    "padding": (lambda run: run.mean("padding_share"), _share),
    "peak memory": (lambda run: run.most("peak_memory_bytes"), _gib),
}
"""What a row of the table tells, of a run; of an arm it is the mean over seeds."""
COMPARED = ("parameters", "active for each token", "FLOPs a token", "tokens", "FLOPs", "training time", "peak memory")


def table_of(runs: Sequence[SeenRun]) -> list[dict[str, str]]:
    """A column an arm, a row a number."""
    arms = arms_of(runs)
    rows = [{"": "seeds", **{arm: _seeds(own) for arm, own in arms.items()}}]
    for title, (number, form) in NUMBERS.items():
        rows.append({"": title, **{arm: _mean_text(own, number, form) for arm, own in arms.items()}})
    rows.append({"": "routing", **{arm: _routing(own) or UNKNOWN for arm, own in arms.items()}})
    rows.append({"": "machine", **{arm: _machines(own) for arm, own in arms.items()}})
    return [row for row in rows if any(text != UNKNOWN for key, text in row.items() if key)]


def scores_of(runs: Sequence[SeenRun]) -> list[dict[str, str]]:
    """A row a measure, a column an arm: the mean over seeds, and half its 95% interval where there are several."""
    rows = []
    for measure, samples in headline(runs):
        row = {"": measure.words}
        for arm in arms_of(runs):
            values = [samples[n].value for n, run in enumerate(runs) if run.arm == arm and n in samples]
            told = estimate(values)
            row[arm] = UNKNOWN if told is None else told.told(measure.form)
        rows.append(row)
    return rows


def unlike(runs: Sequence[SeenRun], first: str | None = None) -> Iterator[str]:
    """A line an arm: by how much what it is and takes differs from the first's."""
    arms = arms_of(runs)
    names = sorted(arms, key=lambda arm: arm != first) if first in arms else list(arms)
    for arm in names[1:]:
        parts, unknown = [], []
        for title in COMPARED:
            ours, theirs = (_mean(arms[name], NUMBERS[title][0]) for name in (arm, names[0]))
            if not ours or not theirs:
                unknown.append(title)
            elif abs(ours / theirs - 1) >= TOLD_FROM:
                parts.append(f"{title} {ours / theirs - 1:+.1%}")
        routing = [_routing(arms[name]) for name in (arm, names[0])]
        machine = [_machines(arms[name]) for name in (arm, names[0])]
        parts += [f"routing {routing[0]} in place of {routing[1]}"] if all(routing) and len(set(routing)) > 1 else []
        parts += ["another machine"] if len(set(machine)) > 1 and UNKNOWN not in machine else []
        told = ", ".join(parts) or ("nothing that is known of both differs" if unknown else "nothing told here differs")
        yield f"{arm} beside {names[0]}: {told}" + (f"; not known of both: {', '.join(unknown)}" if unknown else "")


def notes_of(runs: Sequence[SeenRun]) -> Iterator[str]:
    """What is not known of runs, and why: once for runs that share it."""
    told: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            told.setdefault(note, []).append(run.name)
    yield from (f"{', '.join(names)}: {note}" for note, names in told.items())


def settings_table(runs: Sequence[SeenRun]) -> list[dict[str, str]]:
    """A row for each key in which configurations differ, a column an arm; seeds and names are left out."""
    flats = {arm: [dict(leaves(run.config)) for run in own if run.config] for arm, own in arms_of(runs).items()}
    return [
        {"key": key, **{arm: every([each.get(key, UNKNOWN) for each in own]) for arm, own in flats.items() if own}}
        for key in differing([each for own in flats.values() for each in own])
    ]


def configs_of(runs: Sequence[SeenRun]) -> str:
    """Each arm's configuration, one below the other."""
    firsts = [own[0] for own in arms_of(runs).values() if own[0].config_toml]
    return "\n".join(f"# {run.arm}: {run.folder.name}\n{run.config_toml}" for run in firsts)


def difference_row(each: Difference) -> dict[str, str]:
    """For the page: the sentence beside its numbers."""
    return {"measure": each.measure.words, "arms": f"{each.arm} less {each.other}", "difference": each.numbers,
            "pairs": str(len(each.seeds)), "verdict": each.verdict}  # fmt: skip


def _seeds(runs: Sequence[SeenRun]) -> str:
    known = [str(run.seed) for run in runs if run.seed is not None]
    return ", ".join(known) if known else f"{len(runs)} run{'s' if len(runs) > 1 else ''}, seed not known"


def _mean(runs: Sequence[SeenRun], number: Number) -> float | None:
    known = [value for run in runs if (value := number(run)) is not None]
    return statistics.fmean(known) if known else None


def _mean_text(runs: Sequence[SeenRun], number: Number, form: Callable[[float], str]) -> str:
    mean = _mean(runs, number)
    return UNKNOWN if mean is None else form(mean)


def _routing(runs: Sequence[SeenRun]) -> str:
    return every([run.routing for run in runs])


def _machines(runs: Sequence[SeenRun]) -> str:
    known = [told for run in runs if (told := _machine(run)) != UNKNOWN]
    return every(known) or UNKNOWN


def _machine(run: SeenRun) -> str:
    told, ranks = run.environment.get("machine"), run.environment.get("ranks", 1)
    return f"{told}, {ranks} rank{'s' if ranks != 1 else ''}" if told else UNKNOWN
