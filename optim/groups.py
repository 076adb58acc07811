"""Which parameters get which optimizer, and which of them decay."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from optim.muon import MuonOverRanks
from optim.schedule import ConstantSchedule, ScheduleSettings
from settings import Section

Share = Annotated[float, Field(ge=0, lt=1)]


class AdamWSettings(Section):
    """AdamW for every parameter (Loshchilov and Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(gt=0)
    """The peak; the schedule scales it."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    epsilon: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest norm that all gradients together may have."""
    schedule: ScheduleSettings = ConstantSchedule()


class MuonSettings(Section):
    """Muon for hidden matrices; AdamW for embeddings, head, routers, vectors and the experts' stacked matrices.

    Updates are scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so one learning rate can serve both.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: float = Field(gt=0)
    """The peak for Muon's matrices; the schedule scales it."""
    adamw_learning_rate: float | None = Field(default=None, gt=0)
    """The peak for all other parameters; left out, the same."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm that all gradients together may have."""
    schedule: ScheduleSettings = ConstantSchedule()


OptimizerSettings = Annotated[AdamWSettings | MuonSettings, Field(discriminator="kind")]


class Optimizer:
    """One or two torch optimizers stepped together; between them they hold every parameter exactly once."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], learning_rate: float, clip: float) -> None:
        self.optimizers = tuple(optimizers)
        self.learning_rate = learning_rate
        self.clip = clip
        # Groups keep their ratio to the learning rate that they were built with.
        self._ratios = [group["lr"] / learning_rate for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers in turn."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter, once."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give `learning_rate` to the next step; a group built with another one keeps its ratio to it."""
        self.learning_rate = learning_rate
        for group, ratio in zip(self.param_groups, self._ratios, strict=True):
            group["lr"] = learning_rate * ratio

    def step(self) -> None:
        """One step of every optimizer."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def forget_moments(self) -> None:
        """Start anew from the weights as they are: moments and the count of steps that corrects their bias are gone."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """One state dictionary an optimizer."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take back what `state_dict` returned."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


@dataclass(frozen=True)
class Parts:
    """What a parameter here is a part of, where ranks have cut it."""

    gather: Callable[[nn.Parameter, Tensor], Tensor]
    """What is here of something of the parameter's shape, to the whole of it; all that have a part have to call."""
    take: Callable[[nn.Parameter, Tensor], Tensor]
    """The whole of something, to what of it belongs here."""


def build_optimizer(model: nn.Module, settings: AdamWSettings | MuonSettings, parts: Parts | None = None) -> Optimizer:
    """The optimizer of a model whose parameters already lie on their device. parts: where ranks have cut some."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if isinstance(settings, AdamWSettings):
        return Optimizer([_adamw(named, settings, settings.learning_rate)], settings.learning_rate, settings.clip)
    matrices = [(name, parameter) for name, parameter in named if is_hidden_matrix(name, parameter)]
    others = [(name, parameter) for name, parameter in named if not is_hidden_matrix(name, parameter)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(_muon(matrices, settings, parts))
    if others:
        optimizers.append(_adamw(others, settings, settings.adamw_learning_rate or settings.learning_rate))
    return Optimizer(optimizers, settings.learning_rate, settings.clip)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and stacks of them except embeddings; never to norms and biases."""
    return parameter.ndim >= 2 and not _is_embedding(name) and not name.endswith("bias")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: a matrix from one hidden layer to another, so no embedding, head or router.

    Nor the one row that is a shared expert's gate: its update would be its direction alone.
    """
    is_outside = _is_embedding(name) or bool({"head", "lm_head", "router"} & set(name.split(".")))
    return parameter.ndim == 2 and min(parameter.shape) > 1 and not is_outside


def _is_embedding(name: str) -> bool:
    return any("embed" in part for part in name.split("."))


def _groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> Iterator[dict[str, Any]]:
    """By decay, and by the mesh that tensors are cut over, as torch steps those of one group together."""
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for name, parameter in named:
        mesh = getattr(parameter, "device_mesh", None)
        groups.setdefault((decays(name, parameter), mesh), []).append(parameter)
    for (does_decay, _), parameters in sorted(groups.items(), key=lambda item: not item[0][0]):
        yield {"params": parameters, "weight_decay": weight_decay if does_decay else 0.0}


def _adamw(
    named: list[tuple[str, nn.Parameter]], settings: AdamWSettings | MuonSettings, learning_rate: float
) -> torch.optim.AdamW:
    is_fused = all(parameter.device.type in ("cpu", "cuda") for _, parameter in named)
    return torch.optim.AdamW(
        list(_groups(named, settings.weight_decay)),
        lr=learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=is_fused,
    )


def _muon(named: list[tuple[str, nn.Parameter]], settings: MuonSettings, parts: Parts | None) -> torch.optim.Muon:
    groups = list(_groups(named, settings.weight_decay))
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "momentum": settings.momentum,
        "adjust_lr_fn": "match_rms_adamw",
    }
    if parts is None:
        return torch.optim.Muon(groups, **options)
    return MuonOverRanks(groups, parts.gather, parts.take, **options)
