"""The mixture-of-experts feed-forward layer."""

from typing import Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from moe.balance import Balances, LossBalanceSettings
from moe.capacity import CapacitySettings
from moe.choice import MOST_EXPERTS, ExpertChoiceSettings, TokenChoiceSettings, check_groups
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.experts import Experts, MatmulName
from moe.router import Extras, NullSettings, Router, RouterSettings, SoftmaxRouterSettings
from moe.routing import Memo, RoutingStats, TokenFacts
from settings import Section


class MoESettings(Section):
    """How many experts there are, how many a token meets, and how they are kept busy."""

    num_experts: int = Field(gt=0, le=MOST_EXPERTS)
    experts_per_token: int = Field(gt=0, le=MOST_EXPERTS)
    expert_width: int = Field(gt=0, le=1_000_000)
    """Feed-forward width of one expert."""
    num_shared_experts: int = Field(default=0, ge=0, le=MOST_EXPERTS)
    """Experts that every token meets besides the chosen ones, with weight 1."""
    shared_gate: bool = False
    """Whether each token weighs the shared experts itself, by a sigmoid of its own (Qwen2-MoE)."""
    null_experts: NullSettings | None = None
    """Left out: every expert computes."""
    capacity: CapacitySettings | None = None
    """Left out: no slot is ever dropped."""
    router: RouterSettings = SoftmaxRouterSettings()
    balance: Balances = (LossBalanceSettings(),)
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the router z-loss."""
    experts: MatmulName = "auto"
    """How experts multiply; auto is the fastest that can run."""
    recompute: Literal["none", "up"] = "none"
    """up: experts keep their input alone for the backward pass and multiply by their first matrix once more."""

    @property
    def has_bias(self) -> bool:
        """Whether a rule moves a selection bias, which the router then has."""
        return any(rule.kind == "bias" for rule in self.balance)

    @property
    def needs_whole_rows(self) -> bool:
        """Whether a token's experts depend on all of its row, so that no rank may hold only a part of it."""
        return self.capacity is not None or self.router.kind == "expert_choice"

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be at most num_experts={self.num_experts}"
            )
        normalizes = not isinstance(self.router, ExpertChoiceSettings) and self.router.normalize
        candidates = self.num_experts + (self.null_experts.count if self.null_experts else 0)
        if self.experts_per_token == 1 and candidates > 1 and normalizes:
            raise ValueError(
                "experts_per_token=1 with router.normalize=true makes every gate 1, so the router learns nothing"
                " from the loss; set router.normalize=false"
            )
        if self.shared_gate and not self.num_shared_experts:
            raise ValueError("shared_gate=true weighs nothing: set num_shared_experts=1 or more, or leave it out")
        return self

    @model_validator(mode="after")
    def _check_token_choice(self) -> Self:
        """Refuse what means nothing unless tokens choose by score."""
        if not isinstance(self.router, TokenChoiceSettings):
            for key, is_set in (("capacity", self.capacity is not None), ('balance.kind="bias"', self.has_bias)):
                if is_set:
                    raise ValueError(
                        f"{key} needs a router in which tokens choose by score; leave it out, or set router.kind to"
                        f' "softmax", "sigmoid" or "sqrt_softplus" (it is "{self.router.kind}")'
                    )
        elif self.router.groups is not None:
            check_groups(self.router.groups, self.num_experts, self.experts_per_token)
        return self

    @model_validator(mode="after")
    def _check_null_experts(self) -> Self:
        if self.null_experts is None:
            return self
        if self.router.kind == "expert_choice":
            raise ValueError(
                'null_experts means nothing with router.kind="expert_choice", where a token may meet no expert anyway;'
                " leave it out"
            )
        if isinstance(self.router, TokenChoiceSettings) and self.router.groups is not None:
            raise ValueError("null_experts belong to no group of experts: leave out null_experts or router.groups")
        return self


class SharedExperts(nn.Module):
    """A dense SwiGLU that every token goes through: parameters `gate_up` (2F, D), gate first, and `down` (D, F).

    With a gate, `gate` (1, D), the answer is weighed by sigmoid(gate x).
    """

    def __init__(self, width: int, hidden_width: int, has_gate: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)
        self.gate = nn.Linear(width, 1, bias=False) if has_gate else None

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        gate, up = self.gate_up(x_ND).chunk(2, dim=-1)
        out_ND = self.down(F.silu(gate) * up)
        return out_ND if self.gate is None else out_ND * self.gate(x_ND).sigmoid()


class MoE(nn.Module):
    """Each token through its K chosen experts, summed by their gates, plus the shared experts."""

    dispatcher: Dispatcher

    def __init__(self, settings: MoESettings, width: int, layer: int = 0) -> None:
        """`layer`: its place in the model, so that no two layers draw the same."""
        super().__init__()
        self.router = Router(
            settings.router,
            width,
            settings.num_experts,
            settings.experts_per_token,
            has_bias=settings.has_bias,
            extras=Extras(settings.null_experts, settings.capacity, layer),
        )
        self.dispatcher = LocalDispatcher()
        self.experts = Experts(settings.num_experts, width, settings.expert_width, settings.experts, settings.recompute)
        shared_width = settings.num_shared_experts * settings.expert_width
        self.shared = SharedExperts(width, shared_width, settings.shared_gate) if shared_width else None

    def forward(
        self, x_BTD: Tensor, facts: TokenFacts | None = None, memo: Memo | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """Tokens (B, T, D) to (B, T, D), and what was decided for the N = B*T of them.

        memo: what a first pass decided, for its recomputation.
        """
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        stats = self.router(x_ND, facts, memo)
        parcel = self.dispatcher.send(x_ND, stats.chosen_NK, stats.gates_NK, memo)
        # What stays here is worked on while the rest travels; and with nothing behind the experts that saves tensors,
        # a recomputation ends before their answers travel home once more.
        stays = [] if self.shared is None else [self.shared(x_ND)]
        if stats.copy_N is not None:
            stays.append(stats.copy_N[:, None].to(x_ND.dtype) * x_ND)
        max_rows = self.router.max_rows(facts) if parcel.num_slots is None else parcel.num_slots
        out_ND = parcel.bring_back(self.experts(*parcel.receive(), max_rows))
        for part_ND in stays:
            out_ND = out_ND + part_ND
        return out_ND.view_as(x_BTD), stats
