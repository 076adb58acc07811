"""Which experts each token goes to, and how much each of them counts."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from settings import Section


class SoftmaxRouterSettings(Section):
    """Experts compete: scores are a softmax over all of them (Shazeer et al. 2017; Mixtral)."""

    kind: Literal["softmax"] = "softmax"
    normalize: bool = True
    """Whether the gates of a token's chosen experts are scaled to sum to 1."""
    scale: float = Field(default=1.0, gt=0)
    """What the gates are multiplied with in the end."""


class SigmoidRouterSettings(Section):
    """Each expert is scored alone, by a sigmoid; a selection bias may steer the choice (DeepSeek-V3, section 2.1.2)."""

    kind: Literal["sigmoid"] = "sigmoid"
    normalize: bool = True
    """Whether the gates of a token's chosen experts are scaled to sum to 1."""
    scale: float = Field(default=1.0, gt=0)
    """What the gates are multiplied with in the end."""


RouterSettings = Annotated[SoftmaxRouterSettings | SigmoidRouterSettings, Field(discriminator="kind")]

# In logarithms, so that scaling scores to sum to 1 is a softmax: exact however small they are, no epsilon needed.
LOG_SCORES = {"softmax": lambda logits_NE: logits_NE.log_softmax(dim=-1), "sigmoid": F.logsigmoid}


@dataclass(frozen=True)
class RoutingStats:
    """What one MoE layer decided for N tokens; returned, never kept in a module, so recompute counts nothing twice."""

    logits_NE: Tensor
    """Raw router outputs, fp32, with gradient."""
    probabilities_NE: Tensor
    """Scores scaled to sum to 1 over all experts, fp32, with gradient: what the balance loss uses."""
    chosen_NK: Tensor
    """The experts of each token, int64, best first."""
    gates_NK: Tensor
    """How much each chosen expert counts, fp32, with gradient."""
    counts_E: Tensor
    """Rows routed to each expert, int64; they sum to N*K."""


class Router(nn.Module):
    """Score all experts for each token and choose the best K; fp32 throughout, under autocast too."""

    bias_E: Tensor | None

    def __init__(self, settings: RouterSettings, width: int, num_experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.normalize = settings.normalize
        self.scale = settings.scale
        self.log_scores = LOG_SCORES[settings.kind]
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        has_bias = settings.kind == "sigmoid"
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32) if has_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A small random weight and a bias of 0."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias_E is not None:
            nn.init.zeros_(self.bias_E)

    def forward(self, x_ND: Tensor) -> RoutingStats:
        """Route N tokens: x (N, D) of any float dtype to RoutingStats in fp32 (fp64 for fp64 tokens)."""
        with torch.autocast(x_ND.device.type, enabled=False):
            # fp32: bf16 rounding flips near-tied experts.
            dtype = torch.promote_types(x_ND.dtype, torch.float32)
            logits_NE = F.linear(x_ND.to(dtype), self.weight.to(dtype))
            log_scores_NE = self.log_scores(logits_NE)
            chosen_NK = self.choose(log_scores_NE.detach())
            log_gates_NK = log_scores_NE.gather(-1, chosen_NK)
            gates_NK = log_gates_NK.softmax(dim=-1) if self.normalize else log_gates_NK.exp()
            return RoutingStats(
                logits_NE=logits_NE,
                probabilities_NE=log_scores_NE.softmax(dim=-1),
                chosen_NK=chosen_NK,
                gates_NK=gates_NK if self.scale == 1.0 else gates_NK * self.scale,
                counts_E=count_rows(chosen_NK, len(self.weight)),
            )

    def choose(self, log_scores_NE: Tensor) -> Tensor:
        """The K best experts of each token, (N, K); the bias takes part here and nowhere else."""
        if self.bias_E is None:
            return log_scores_NE.topk(self.experts_per_token, dim=-1).indices
        return (log_scores_NE.exp() + self.bias_E).topk(self.experts_per_token, dim=-1).indices


def count_rows(chosen_NK: Tensor, num_experts: int) -> Tensor:
    """How many rows go to each expert, (E,) int64; without waiting for the device."""
    chosen_R = chosen_NK.reshape(-1)
    return torch.zeros(num_experts, dtype=torch.int64, device=chosen_NK.device).scatter_add_(
        0, chosen_R, torch.ones_like(chosen_R)
    )
