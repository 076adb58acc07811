"""A plan as text: tables of what each stage of a run computes, needs and takes."""

from collections.abc import Iterator, Sequence

from model.memory import parts
from model.size import Size
from parallel.mesh import Axis, Grid
from planning.asked import Asked
from planning.device import Device
from planning.forecast import Forecast
from planning.step_parts import Part
from run.metrics import clock, short
from run.needs import gigabytes

Row = dict[str, str]


def size_in_words(size: Size) -> str:
    """`1.23B parameters, of which a token meets 456M: embedding 98.3M, ...`."""
    inner = (f"{name} {short(value)}" for name, value in vars(size).items() if value and name != "active_experts")
    told = ", ".join(inner).replace("_", " ")
    return f"{short(size.total)} parameters, of which a token meets {short(size.active)}: {told}"


def stage_rows(told: Sequence[Forecast]) -> Iterator[Row]:
    """What each stage is, computes and takes, and all of them together."""
    for forecast in told:
        stage, longest = forecast.stage, forecast.stage.longest_step().sequence_length
        yield {
            "stage": str(stage.index),
            "tokens": short(stage.num_tokens),
            "steps": f"{stage.num_steps:,}",
            "length": f"{longest:,}",
            "rows a step": f"{stage.tokens_per_step // longest:,}",
            "a micro-batch": f"{forecast.num_rows:,}",
            "ranks a row": str(forecast.row_ranks),
            "FLOP a token": short(forecast.flops / stage.num_tokens),
            "as if full": short(forecast.full_flops_per_token),
            **_sums([forecast]),
        }
    stages = [forecast.stage for forecast in told]
    tokens, steps = sum(stage.num_tokens for stage in stages), sum(stage.num_steps for stage in stages)
    yield {"stage": "all", "tokens": short(tokens), "steps": f"{steps:,}", **_sums(told)}


def _sums(told: Sequence[Forecast]) -> Row:
    flops = sum(forecast.flops for forecast in told)
    return {
        "FLOP": f"{flops:.3g}",
        "in attention": f"{sum(forecast.attention_flops for forecast in told) / flops:.1%}",
        "memory": gigabytes(max(forecast.needed.total for forecast in told)),
        "time": clock(sum(forecast.seconds for forecast in told)),
    }


def memory_rows(told: Sequence[Forecast], device: Device, asked: Asked | None = None) -> Iterator[Row]:
    """Each part of a rank's memory in every stage when most is needed, their sum, what evaluations need in place of
    activations, and the share of the device that the larger of the two is."""
    title, names = "memory of a rank", [f"stage {forecast.stage.index}" for forecast in told]
    needed = [dict(parts(forecast.needed)) for forecast in told]
    for part in dict.fromkeys(part for stage in needed for part in stage):
        yield {title: part, **dict(zip(names, (gigabytes(stage.get(part, 0)) for stage in needed), strict=True))}
    totals = [forecast.needed.total for forecast in told]
    yield {title: "all", **dict(zip(names, map(gigabytes, totals), strict=True))}
    if asked is not None:
        then = [asked.beside(forecast.needed) for forecast in told]
        evaluation = {
            f"in evaluation: keys and values, {asked.length:,} tokens": [asked.cache] * len(told),
            "in evaluation: a forward pass": [asked.forward] * len(told),
            "in evaluation: the whole model": [asked.whole] * len(told),
            "in evaluation: all, with weights, gradients, moments": then,
        }
        for part, sizes in evaluation.items():
            if any(sizes):
                yield {title: part, **dict(zip(names, map(gigabytes, sizes), strict=True))}
        totals = [max(pair) for pair in zip(totals, then, strict=True)]
    if device.memory is not None:
        shares = (f"{total / device.memory:.1%}" + ("!" if total > device.memory else "") for total in totals)
        yield {title: f"of {gigabytes(device.memory)}", **dict(zip(names, shares, strict=True))}


def mesh_in_words(grid: Grid, ranks_per_node: int) -> str:
    """`64 ranks = pipeline 2 x replicate 2 x shard 8 x tensor 2, on 8 nodes; expert 8 among neighbours`."""
    axes: tuple[Axis, ...] = ("pipeline", "replicate", "shard", "tensor")
    lengths = {axis: grid.length(axis) for axis in axes if grid.length(axis) > 1}
    told = " x ".join(f"{axis} {length}" for axis, length in lengths.items())
    nodes = -(-grid.size // ranks_per_node)
    text = f"{grid.size} rank{'s' * (grid.size > 1)}" + (f" = {told}" if told else "")
    text += f", on {nodes} nodes of {ranks_per_node}" if nodes > 1 else ""
    if grid.expert > 1:
        shards = grid.length("expert_shard")
        text += f"; {grid.expert} neighbours share experts" + (f", {shards} cut each" if shards > 1 else "")
    return text


def time_rows(told: Sequence[Forecast]) -> Iterator[Row]:
    """Each part of a rank's longest step in every stage, what of it runs behind something else, and what it sends."""
    title, steps = "a step of a rank", [forecast.step for forecast in told]
    names = [f"stage {forecast.stage.index}" for forecast in told]
    parts = [{part.name: part for part in step.parts} for step in steps]
    for name in dict.fromkeys(name for stage in parts for name in stage):
        cells = [_part_in_words(stage[name]) if name in stage else "" for stage in parts]
        yield {title: name, **dict(zip(names, cells, strict=True))}
    yield {title: "all", **{name: seconds(step.seconds) for name, step in zip(names, steps, strict=True)}}
    yield {
        title: "tokens a second, of a rank",
        **{name: short(step.tokens_per_second) for name, step in zip(names, steps, strict=True)},
    }
    yield {title: "MFU", **{name: f"{step.utilization:.1%}" for name, step in zip(names, steps, strict=True)}}


def _part_in_words(part: Part) -> str:
    text = seconds(part.exposed)
    text += f" + {seconds(part.hidden)} hidden" if part.hidden > 0 else ""
    return text + (f", sends {gigabytes(part.sent)}" if part.is_sent else "")


def seconds(time: float) -> str:
    """`1.23 s`, `45.6 ms`, `7.89 us`."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if time >= size:
            return f"{time / size:.3g} {unit}"
    return f"{time / 1e-6:.3g} us"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of columns under their titles: the first to the left, numbers to the right. Titles are the first row's."""
    titles = list(rows[0])
    lines = [titles, *([row.get(title, "") for title in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()
