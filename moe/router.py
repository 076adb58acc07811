"""Which experts each token goes to, and how much each of them counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from moe.capacity import CapacitySettings, drop_excess
from moe.choice import (
    JITTER,
    MOST_EXPERTS,
    NO_EVALUATION,
    Chooser,
    Drawn,
    ExpertChoice,
    ExpertChoiceSettings,
    HashSettings,
    InTurn,
    RandomSettings,
    TokenChoice,
    TokenChoiceSettings,
    UniformSettings,
    told,
)
from moe.draws import uniform
from moe.routing import Memo, RoutingStats, TokenFacts
from settings import Section


class SoftmaxRouterSettings(TokenChoiceSettings):
    """Experts compete: scores are a softmax over all of them (Shazeer et al. 2017; Mixtral)."""

    kind: Literal["softmax"] = "softmax"


class SigmoidRouterSettings(TokenChoiceSettings):
    """Each expert is scored alone, by a sigmoid (DeepSeek-V3, section 2.1.2)."""

    kind: Literal["sigmoid"] = "sigmoid"


class SqrtSoftplusRouterSettings(TokenChoiceSettings):
    """Each expert is scored alone, by sqrt(softplus(logit)), which has no upper bound (DeepSeek-V4, section 2.1)."""

    kind: Literal["sqrt_softplus"] = "sqrt_softplus"


RouterSettings = Annotated[
    SoftmaxRouterSettings
    | SigmoidRouterSettings
    | SqrtSoftplusRouterSettings
    | ExpertChoiceSettings
    | RandomSettings
    | HashSettings
    | UniformSettings,
    Field(discriminator="kind"),
    # The default's keys can be set without naming it: `model.moe.router.normalize=false`.
    BeforeValidator(lambda given: {"kind": "softmax", **given} if isinstance(given, dict) else given),
]


def log_softmax(logits_NE: Tensor) -> Tensor:
    return logits_NE.log_softmax(dim=-1)


def log_sqrt_softplus(logits_NE: Tensor) -> Tensor:
    """log(sqrt(log(1 + e^x))), finite with its gradient for every finite x."""
    # Below -40 softplus(x) is e^x to the last bit, even in fp64. Clamped first: `where` would let a nan's gradient by.
    high_NE = -F.logsigmoid(-logits_NE.clamp(min=-40.0))
    return 0.5 * torch.where(logits_NE < -40.0, logits_NE, high_NE.log())


# How a kind scores and how it chooses.
# Scores in logarithms, so that scaling them to sum to 1 is a softmax: exact however small they are, no epsilon needed.
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Chooser]]] = {
    "softmax": (log_softmax, TokenChoice),
    "sigmoid": (F.logsigmoid, TokenChoice),
    "sqrt_softplus": (log_sqrt_softplus, TokenChoice),
    "expert_choice": (log_softmax, ExpertChoice),
    "random": (log_softmax, Drawn),
    "hash": (log_softmax, Drawn),
    "uniform": (log_softmax, InTurn),
}


class NullSettings(Section):
    """Experts that compute nothing, so that a token may meet fewer than K (AdaMoE; MoE++; LongCat-Flash)."""

    count: int = Field(gt=0, le=MOST_EXPERTS)
    """The router scores so many experts more; they stand behind the real ones."""
    output: Literal["zero", "copy"] = "zero"
    """What they answer: nothing, or the token itself, weighed by its gate."""


@dataclass(frozen=True)
class Extras:
    """What few routers have."""

    null_experts: NullSettings | None = None
    capacity: CapacitySettings | None = None
    layer: int = 0
    """Its place in the model: draws differ from layer to layer."""


PLAIN = Extras()


class Router(nn.Module):
    """Score all experts for each token and choose K of them; fp32 throughout, under autocast too.

    Gates are shared out over all K, null experts included, and before capacity drops any.
    """

    bias_E: Tensor | None

    def __init__(
        self,
        settings: RouterSettings,
        width: int,
        num_experts: int,
        experts_per_token: int,
        *,
        has_bias: bool = False,
        extras: Extras = PLAIN,
    ) -> None:
        """`has_bias`: whether there is a selection bias for a balance rule to move (Wang et al. 2024)."""
        super().__init__()
        self.num_experts = num_experts
        self.extras = extras
        self.normalize = not isinstance(settings, ExpertChoiceSettings) and settings.normalize
        self.scale = settings.scale
        self.jitter = settings.jitter if isinstance(settings, TokenChoiceSettings) else 0.0
        self.log_scores, choosing = KINDS[settings.kind]
        self.chooser = choosing(settings, experts_per_token, extras.layer)
        total = num_experts + (extras.null_experts.count if extras.null_experts else 0)
        self.weight = nn.Parameter(torch.empty(total, width))
        self.register_buffer("bias_E", torch.zeros(total, dtype=torch.float32) if has_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A small random weight and a bias of 0."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias_E is not None:
            nn.init.zeros_(self.bias_E)

    def forward(self, x_ND: Tensor, facts: TokenFacts | None = None, memo: Memo | None = None) -> RoutingStats:
        """Route N tokens: x (N, D) of any float dtype to RoutingStats in fp32 (fp64 for fp64 tokens).

        A memo that holds a choice is obeyed, whatever the logits say now; an empty one is given this pass's choice.
        """
        is_real_N = None if facts is None or facts.is_real_BT is None else facts.is_real_BT.flatten()
        has_gaps = is_real_N is not None or (self.chooser.leaves_gaps and self.training)
        kept = None if memo is None else memo.kept.get("choice")
        with torch.autocast(x_ND.device.type, enabled=False):
            # fp32: bf16 rounding flips near-tied experts.
            dtype = torch.promote_types(x_ND.dtype, torch.float32)
            logits_NE = F.linear(self._jittered(x_ND.to(dtype), facts), self.weight.to(dtype))
            log_scores_NE = self.log_scores(logits_NE)
            selected_NK = self._select(log_scores_NE.detach(), facts, is_real_N) if kept is None else kept[0]
            weights_NK = self._weigh(log_scores_NE, selected_NK, has_gaps)
            chosen_NK = self._place(selected_NK, weights_NK.detach(), facts) if kept is None else kept[1]
            if memo is not None:
                memo.kept["choice"] = selected_NK, chosen_NK
            every_slot_goes = chosen_NK is selected_NK and not has_gaps
            return RoutingStats(
                logits_NE=logits_NE,
                probabilities_NE=log_scores_NE.softmax(dim=-1),
                selected_NK=selected_NK,
                chosen_NK=chosen_NK,
                gates_NK=weights_NK if every_slot_goes else weights_NK.where(chosen_NK < self.num_experts, 0.0),
                num_experts=self.num_experts,
                is_real_N=is_real_N,
                copy_N=self._copied(selected_NK, weights_NK),
            )

    def max_rows(self, facts: TokenFacts | None) -> int | None:
        """How many slots go somewhere at most, where the table has far more: in training with expert choice."""
        if not self.training or not isinstance(self.chooser, ExpertChoice):
            return None
        rows, length = told(facts).ids_BT.shape
        return rows * self.num_experts * self.chooser.tokens_per_expert(length, self.num_experts)

    def _jittered(self, x_ND: Tensor, facts: TokenFacts | None) -> Tensor:
        if not self.jitter or not self.training:
            return x_ND
        channels_D = torch.arange(x_ND.shape[1], device=x_ND.device)
        draws_ND = uniform(told(facts).keys_BT.reshape(-1, 1), self.extras.layer, JITTER, channels_D)
        return x_ND * (1 + self.jitter * (2 * draws_ND - 1))

    def _select(self, log_scores_NE: Tensor, facts: TokenFacts | None, is_real_N: Tensor | None) -> Tensor:
        """What tokens want, padding nothing: (N, K)."""
        selected_NK = self.chooser.choose(log_scores_NE, self.bias_E, facts, self.training)
        return selected_NK if is_real_N is None else selected_NK.where(is_real_N[:, None], len(self.weight))

    def _weigh(self, log_scores_NE: Tensor, selected_NK: Tensor, has_gaps: bool) -> Tensor:
        """The gates of the selected, anything in gaps: (N, K); a bias has no part in it."""
        named_NK = selected_NK.clamp(max=len(self.weight) - 1) if has_gaps else selected_NK
        log_gates_NK = log_scores_NE.gather(-1, named_NK)
        gates_NK = log_gates_NK.softmax(dim=-1) if self.normalize else log_gates_NK.exp()
        return gates_NK if self.scale == 1.0 else gates_NK * self.scale

    def _place(self, selected_NK: Tensor, gates_NK: Tensor, facts: TokenFacts | None) -> Tensor:
        """Where slots go: those of null experts and those beyond the capacity nowhere; the same table if all do go."""
        chosen_NK = selected_NK if self.extras.null_experts is None else selected_NK.clamp(max=self.num_experts)
        if self.extras.capacity is None or not self.training:
            return chosen_NK
        return drop_excess(chosen_NK, gates_NK, len(told(facts).ids_BT), self.num_experts, self.extras.capacity)

    def _copied(self, selected_NK: Tensor, gates_NK: Tensor) -> Tensor | None:
        if self.extras.null_experts is None or self.extras.null_experts.output == "zero":
            return None
        is_null_NK = (selected_NK >= self.num_experts) & (selected_NK < len(self.weight))
        return gates_NK.where(is_null_NK, 0.0).sum(dim=-1)


def evaluation_refusal(settings: RouterSettings) -> str | None:
    """Why a model with this router can be neither evaluated nor generate, None where it can: to refuse it in time."""
    refuses = isinstance(settings, ExpertChoiceSettings) and settings.at_eval == "refuse"
    return NO_EVALUATION if refuses else None
