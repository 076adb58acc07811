"""The mixture-of-experts feed-forward layer."""

from typing import Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from moe.balance import BalanceSettings, LossBalanceSettings
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.experts import Experts, MatmulName
from moe.router import Router, RouterSettings, RoutingStats, SoftmaxRouterSettings
from settings import Section


class MoESettings(Section):
    """How many experts there are, how many a token meets, and how they are kept busy."""

    num_experts: int = Field(gt=0)
    experts_per_token: int = Field(gt=0)
    expert_width: int = Field(gt=0)
    """Feed-forward width of one expert."""
    num_shared_experts: int = Field(default=0, ge=0)
    """Experts that every token meets besides the chosen ones, with weight 1."""
    router: RouterSettings = SoftmaxRouterSettings()
    balance: BalanceSettings = LossBalanceSettings()
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the router z-loss."""
    experts: MatmulName = "auto"
    """How experts multiply; auto is the fastest that can run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be at most num_experts={self.num_experts}"
            )
        if self.experts_per_token == 1 and self.num_experts > 1 and self.router.normalize:
            raise ValueError(
                "experts_per_token=1 with router.normalize=true makes every gate 1, so the router learns nothing"
                " from the loss; set router.normalize=false"
            )
        if self.balance.kind == "bias" and self.router.kind != "sigmoid":
            raise ValueError(
                f'balance.kind="bias" moves the selection bias of a sigmoid router; set router.kind="sigmoid" (it is'
                f' "{self.router.kind}") or balance.kind="loss"'
            )
        return self


class SharedExperts(nn.Module):
    """A dense SwiGLU that every token goes through: parameters `gate_up` (2F, D), gate first, and `down` (D, F)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        gate, up = self.gate_up(x_ND).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MoE(nn.Module):
    """Each token through its K chosen experts, summed by their gates, plus the shared experts."""

    dispatcher: Dispatcher

    def __init__(self, settings: MoESettings, width: int) -> None:
        super().__init__()
        self.router = Router(settings.router, width, settings.num_experts, settings.experts_per_token)
        self.dispatcher = LocalDispatcher(settings.num_experts)
        self.experts = Experts(settings.num_experts, width, settings.expert_width, settings.experts)
        shared_width = settings.num_shared_experts * settings.expert_width
        self.shared = SharedExperts(width, shared_width) if shared_width else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, RoutingStats]:
        """Tokens (B, T, D) to (B, T, D), and what was decided for the N = B*T of them."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        stats = self.router(x_ND)
        rows_RD, offsets_E, plan = self.dispatcher.dispatch(x_ND, stats.chosen_NK)
        rows_RD = self.experts(rows_RD, offsets_E)
        out_ND = self.dispatcher.combine(rows_RD, stats.gates_NK, plan)
        if self.shared is not None:
            out_ND = out_ND + self.shared(x_ND)
        return out_ND.view_as(x_BTD), stats
