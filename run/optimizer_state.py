"""The state of every optimizer under the names of the parameters: tensors, and numbers that fit into JSON."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from parallel.shard import Shard, cut_all, gather_all, outline_all, shard_of
from settings import Refusal

JSON: TypeAlias = Any
Tensors = dict[str, torch.Tensor]
Optimizers = Sequence[torch.optim.Optimizer]


def state_of(model: nn.Module, optimizers: Optimizers) -> tuple[Tensors, dict[str, JSON]]:
    """Every optimizer's state under its parameter's name: tensors, and numbers for JSON.

    All ranks have to call; the tensors are whole on rank 0. An optimizer that has not stepped is left alone: torch
    would step it to make room for its state, and count that.
    """
    get_state, _ = _torch_state_dict()
    stepped = [optimizer for optimizer in optimizers if optimizer.state]
    flat: dict[str, Any] = dict(get_state(model, stepped)) if stepped else {}
    names = {parameter: name for name, parameter in named_parameters(model)}
    untouched = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                untouched += [name] if parameter not in optimizer.state else []
                flat |= {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
    tensors = {key: value for key, value in flat.items() if torch.is_tensor(value)}
    numbers = {key: value for key, value in flat.items() if not torch.is_tensor(value)}
    return gather_all(tensors, _shards_of_state(model, tensors)), {"numbers": numbers, "untouched": untouched}


def _torch_state_dict() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """torch's own reader and writer of optimizer state, flat by name; loaded late, as importing them takes a second."""
    from torch.distributed.checkpoint import state_dict

    flat = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
    return (
        partial(state_dict.get_optimizer_state_dict, options=flat),
        partial(state_dict.set_optimizer_state_dict, options=flat),
    )


def load_state(where: str, model: nn.Module, optimizers: Optimizers, tensors: Tensors, values: dict[str, JSON]) -> None:
    """Hand each optimizer what `state_of` returned; refused, with nothing changed, when names or shapes differ.

    where: the checkpoint's name, for the refusal. tensors are whole; each rank takes its part. Gradients are dropped.
    """
    if not optimizers:
        return
    get_state, set_state = _torch_state_dict()
    fresh = [optimizer for optimizer in optimizers if not optimizer.state]
    for parameter in model.parameters():
        parameter.grad = None  # torch makes room for the state only where no gradient is left over
    ours: dict[str, Any] = dict(get_state(model, optimizers))
    untouched = set(values["untouched"])
    expected = {key: value for key, value in ours.items() if torch.is_tensor(value) and _owner(key) not in untouched}
    shards = _shards_of_state(model, expected)
    try:
        check_same(where, "optimizer", tensors, outline_all(expected, shards))
    except Refusal:
        for optimizer in fresh:
            optimizer.state.clear()
        raise
    numbers = {key: _like(value, ours.get(key)) for key, value in values["numbers"].items()}
    # Ours first: a newer torch may know options that the one that saved did not.
    restored: dict[str, Any] = {**ours, **numbers, **cut_all(tensors, shards)}
    set_state(model, optimizers, restored)
    for name, parameter in named_parameters(model):
        if name in untouched:
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)


def check_same(where: str, part: str, saved: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> None:
    """Raise Refusal naming the tensors that only one side has, or that differ in shape or dtype."""
    lines = [f"  {name}: not in the checkpoint" for name in ours.keys() - saved.keys()]
    lines += [f"  {name}: only in the checkpoint, {tuple(saved[name].shape)}" for name in saved.keys() - ours.keys()]
    for name in ours.keys() & saved.keys():
        theirs, wanted = _described(saved[name]), _described(ours[name])
        lines += [f"  {name}: {theirs} in the checkpoint, {wanted} here"] if theirs != wanted else []
    if lines:
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise Refusal(
            f"checkpoint {where} is of another {part}; nothing was loaded:\n"
            + "\n".join(sorted(lines)[:10])
            + more
            + "\n"
            "Use the configuration that wrote it (config.toml beside it), or start anew with --fresh"
        )


def _described(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, under its plain name, whether or not the model is compiled."""
    for name, parameter in model.named_parameters():
        yield name.replace("_orig_mod.", ""), parameter


def shards_of(model: nn.Module) -> dict[str, Shard]:
    """How the parameters are cut that are, by plain name."""
    shards = {name: shard_of(parameter) for name, parameter in named_parameters(model)}
    return {name: shard for name, shard in shards.items() if shard is not None}


def _shards_of_state(model: nn.Module, tensors: Tensors) -> dict[str, Shard]:
    """The same for optimizer state: what has dimensions is cut as its parameter is; a count of steps has none."""
    shards = shards_of(model)
    return {key: shards[_owner(key)] for key, tensor in tensors.items() if tensor.ndim and _owner(key) in shards}


def _owner(key: str) -> str:
    """`state.layers.0.weight.exp_avg` -> `layers.0.weight`; `param_groups.` likewise."""
    return key.partition(".")[2].rpartition(".")[0]


def _like(value: JSON, ours: object) -> object:
    return tuple(value) if isinstance(ours, tuple) and isinstance(value, list) else value
