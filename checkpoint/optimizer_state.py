"""The state of every optimizer under the names of the parameters: tensors, and numbers that fit into JSON.

Names are flat: `state.blocks.0.norm.weight.exp_avg`, `param_groups.blocks.0.norm.weight.lr`. A tensor lies on the ranks
as its parameter does, or is a number that all of them have. Optimizers are read and filled as they are: torch's own
readers would step one that has not stepped, and gather what lies on several ranks.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from checkpoint.deal import Held
from checkpoint.fit import WAY_OUT
from checkpoint.manifest import Damaged
from checkpoint.tensor_file import Outline, outline
from parallel.layout import Layouts, local
from settings import Refusal

JSON: TypeAlias = Any
Tensors = dict[str, Tensor]
Optimizers = Sequence[torch.optim.Optimizer]
Names = Mapping[nn.Parameter, str]


class Wanted(NamedTuple):
    """A tensor that an optimizer keeps for a parameter, whether or not it has made it."""

    parameter: nn.Parameter
    key: str
    owner: str | None
    """The parameter's name where the tensor lies as it does; None: a number."""
    outline: Outline
    """Of the whole."""
    device: torch.device


def state_of(names: Names, optimizers: Optimizers) -> tuple[dict[str, Held], dict[str, JSON]]:
    """This rank's part of every optimizer's state: tensors, and numbers for JSON; names: of the parameters."""
    tensors: dict[str, Held] = {}
    numbers: dict[str, JSON] = {}
    untouched = []
    for optimizer, group, parameter in _parameters(optimizers):
        name, state = names[parameter], optimizer.state.get(parameter, {})
        untouched += [] if state else [name]
        numbers |= {f"param_groups.{name}.{key}": _plain(v) for key, v in group.items() if key != "params"}
        for key, value in state.items():
            if torch.is_tensor(value):
                if value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"{name}: {key} {tuple(value.shape)} is neither like its parameter nor a number")
                tensors[f"state.{name}.{key}"] = Held(local(value), name if value.shape == parameter.shape else None)
            else:
                numbers[f"state.{name}.{key}"] = value
    return tensors, {"numbers": numbers, "untouched": untouched}


def wanted_state(names: Names, optimizers: Optimizers, layouts: Layouts) -> dict[str, Wanted]:
    """What the optimizers keep once they have stepped: nothing of them is changed to find out."""
    wanted: dict[str, Wanted] = {}
    seen: dict[object, dict[str, Tensor]] = {}
    for optimizer, group, parameter in _parameters(optimizers):
        kind = (id(group), parameter.ndim, parameter.dtype, parameter.device)
        if kind not in seen:
            seen[kind] = _try(optimizer, group, parameter)
        name = names[parameter]
        for key, value in seen[kind].items():
            is_like = value.ndim == parameter.ndim
            facts = outline(value.dtype, layouts[name].shape if is_like else value.shape)
            wanted[f"state.{name}.{key}"] = Wanted(parameter, key, name if is_like else None, facts, value.device)
    return wanted


def check_values(values: JSON) -> None:
    """Raise Damaged where these are not the numbers that `state_of` returned."""
    if not isinstance(values, dict) or not isinstance(values.get("numbers"), dict):
        raise Damaged("optimizer.json holds no numbers of an optimizer")
    untouched = values.get("untouched")
    if not isinstance(untouched, list) or not all(isinstance(name, str) for name in untouched):
        raise Damaged("optimizer.json does not say which parameters are untouched")


def new_options(
    where: str, names: Names, optimizers: Optimizers, numbers: Mapping[str, JSON]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every group of parameters with what was saved of its options; nothing is changed.

    Options that only a newer torch knows stay as they are. Raises Refusal where parameters of one group had different
    ones, and Damaged where an option is of another kind. where: the checkpoint's name.
    """
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            options: dict[str, Any] = {}
            for parameter in group["params"]:
                for key, ours in group.items():
                    saved = f"param_groups.{names[parameter]}.{key}" if key != "params" else ""
                    if saved in numbers:
                        value = _like(numbers[saved], ours, saved)
                        if options.setdefault(key, value) != value:
                            raise Refusal(
                                f"checkpoint {where} is of another optimizer; nothing was loaded:\n  {saved} is {value}"
                                f" there, of others that are in one group here {options[key]}\n{WAY_OUT}"
                            )
            found.append((group, options))
    return found


@torch.no_grad()
def load_state(
    names: Names,
    optimizers: Optimizers,
    wanted: Mapping[str, Wanted],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, JSON],
) -> None:
    """Hand each optimizer what `state_of` returned of it, in place of its own; tensors: this rank's parts."""
    for group, options in new_options("", names, optimizers, numbers):
        group |= options
    owners = {parameter: optimizer for optimizer, _, parameter in _parameters(optimizers)}
    for parameter, optimizer in owners.items():
        optimizer.state.pop(parameter, None)
    for name, part in tensors.items():
        want = wanted[name]
        value = part.to(want.device, copy=True)
        if want.owner is not None:
            value = torch.zeros_like(want.parameter, dtype=part.dtype, requires_grad=False)
            local(value).copy_(part)
        owners[want.parameter].state[want.parameter][want.key] = value
    places = {f"state.{name}": parameter for parameter, name in names.items()}
    for name, number in numbers.items():  # a count of steps, as some optimizers have it
        place, _, key = name.rpartition(".")
        if place in places and places[place] in owners:
            owners[places[place]].state[places[place]][key] = number


def owner_of(key: str) -> str:
    """`state.layers.0.weight.exp_avg` -> `layers.0.weight`; `param_groups.` likewise."""
    return key.partition(".")[2].rpartition(".")[0]


def _parameters(optimizers: Optimizers) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], nn.Parameter]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, group, parameter


def _try(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps for a parameter: one of torch's, that it is made of, steps a small one in its place."""
    stand_in = nn.Parameter(torch.zeros((2,) * parameter.ndim, dtype=parameter.dtype, device=parameter.device))
    stand_in.grad = torch.zeros_like(stand_in)
    kind = next(base for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim"))
    other: torch.optim.Optimizer = object.__new__(kind)
    groups = [{**group, "params": [stand_in]}]
    other.__setstate__({"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": groups})
    other.step()
    return {key: value for key, value in other.state[stand_in].items() if torch.is_tensor(value)}


def _like(saved: JSON, ours: object, name: str) -> object:
    """A saved option as the optimizer has it; raises Damaged where that is of another kind."""
    if torch.is_tensor(ours):
        ours = ours.item()
    kinds = [
        type(None) if value is None else (int, float) if isinstance(value, int | float) else type(_plain(value))
        for value in (saved, ours)
    ]
    if type(None) not in kinds and kinds[0] != kinds[1]:
        raise Damaged(f"optimizer.json: {name} is {saved!r}, an optimizer has {ours!r}")
    return tuple(saved) if isinstance(ours, tuple) and isinstance(saved, list) else saved


def _plain(option: object) -> JSON:
    """An option of a group as JSON has it."""
    if torch.is_tensor(option):
        return option.item()
    return list(option) if isinstance(option, tuple) else option
