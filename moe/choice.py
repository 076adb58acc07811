"""How experts are chosen: by each token, by each expert, or, in controls, by neither of them.

Choices never depend on how a step is cut into micro-batches or over ranks, nor on a generator's state.
"""

from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from moe.draws import mix
from moe.routing import TokenFacts
from settings import Refusal, Section

# What a draw is for: two purposes never see the same numbers.
RANDOM, HASH, TURN, JITTER = range(1, 5)

MOST_EXPERTS = 1 << 16
"""Of a layer: bounded, so that the sizes of all tensors are numbers."""


class Chooser(Protocol):
    """One way to choose; built for one layer."""

    leaves_gaps: bool
    """Whether slots can stay empty in training."""

    def choose(
        self, log_scores_NE: Tensor, bias_E: Tensor | None, facts: TokenFacts | None, is_training: bool
    ) -> Tensor:
        """Experts of each token, int64 (N, K), best first where there is a best; E for a slot that stays empty."""
        ...


class GroupSettings(Section):
    """Each token's experts lie in few groups, as many as live on few devices (DeepSeek-V2, section 2.2.2)."""

    count: int = Field(gt=1, le=MOST_EXPERTS)
    """Groups that the experts are cut into, in order and of equal size."""
    keep: int = Field(gt=0)
    """Groups that a token may choose from."""
    score: Literal["top2", "max"] = "top2"
    """What ranks groups: the sum of their two best experts (DeepSeek-V3), or their best one (DeepSeek-V2)."""


class TokenChoiceSettings(Section):
    """What all kinds share in which each token takes the experts that it scores highest."""

    kind: str
    normalize: bool = True
    """Whether the gates of a token's K experts sum to 1 (softmax after top-k) or are the scores themselves (before)."""
    scale: float = Field(default=1.0, gt=0)
    """What the gates are multiplied with in the end."""
    groups: GroupSettings | None = None
    """Left out: a token may choose from all experts."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training the router's input is multiplied by draws from [1-jitter, 1+jitter) (Switch, appendix C)."""


class TokenChoice:
    """Each token takes its K best experts; a selection bias takes part in that and in nothing else."""

    leaves_gaps = False

    def __init__(self, settings: TokenChoiceSettings, experts_per_token: int, layer: int) -> None:
        self.experts_per_token = experts_per_token
        self.groups = settings.groups

    def choose(
        self, log_scores_NE: Tensor, bias_E: Tensor | None, facts: TokenFacts | None, is_training: bool
    ) -> Tensor:
        """See Chooser."""
        scores_NE = log_scores_NE
        if bias_E is not None or self.groups is not None:
            scores_NE = log_scores_NE.exp()
        if bias_E is not None:
            scores_NE = scores_NE + bias_E
        if self.groups is not None:
            scores_NE = within_best_groups(scores_NE, self.groups)
        return scores_NE.topk(self.experts_per_token, dim=-1).indices


def within_best_groups(scores_NE: Tensor, groups: GroupSettings) -> Tensor:
    """The scores (N, E), -inf for every expert outside its token's `groups.keep` best groups."""
    grouped = scores_NE.unflatten(-1, (groups.count, -1))
    group_scores = grouped.topk({"top2": 2, "max": 1}[groups.score], dim=-1).values.sum(dim=-1)
    best = group_scores.topk(groups.keep, dim=-1, sorted=False).indices
    is_excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best, False)
    # -inf and not 0: a bias can make scores negative.
    return grouped.masked_fill(is_excluded.unsqueeze(-1), -torch.inf).flatten(-2)


def check_groups(groups: GroupSettings, num_experts: int, experts_per_token: int) -> None:
    """Raises ValueError where so many experts cannot be grouped, or K of them not be found in the groups kept."""
    if num_experts % groups.count:
        near = [count for count in range(2, num_experts + 1) if num_experts % count == 0]
        raise ValueError(f"router.groups.count={groups.count} must divide num_experts={num_experts}; try one of {near}")
    size = num_experts // groups.count
    if groups.keep > groups.count:
        raise ValueError(f"router.groups.keep={groups.keep} must be at most router.groups.count={groups.count}")
    if groups.keep * size < experts_per_token:
        raise ValueError(
            f"router.groups.keep={groups.keep} groups of {size} experts hold fewer than experts_per_token="
            f"{experts_per_token}; raise keep to {-(-experts_per_token // size)} or more"
        )
    if groups.score == "top2" and size < 2:
        raise ValueError(
            f'router.groups.score="top2" needs groups of 2 experts or more, count={groups.count} leaves {size};'
            ' lower count or set score="max"'
        )


class ExpertChoiceSettings(Section):
    """Each expert takes its best tokens of a row, as many for each expert (Zhou et al. 2022).

    Balanced by construction, but whether a token is taken depends on the tokens after it: the model sees the future
    in training, and a model trained this way cannot be evaluated or generate as it was trained.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    scale: float = Field(default=1.0, gt=0)
    """What the gates, the softmax scores as they are, are multiplied with."""
    at_eval: Literal["refuse", "token_choice"] = "refuse"
    """Outside training: refuse, or give each token its own K best experts, which needs no later token."""


class ExpertChoice:
    """In each row of T tokens each expert takes the ceil(T*K/E) that score it highest; padding is never taken.

    In training the table has K = E columns, one for each expert, empty where it did not take the token.
    """

    leaves_gaps = True

    def __init__(self, settings: ExpertChoiceSettings, experts_per_token: int, layer: int) -> None:
        self.experts_per_token = experts_per_token
        self.at_eval = settings.at_eval

    def choose(
        self, log_scores_NE: Tensor, bias_E: Tensor | None, facts: TokenFacts | None, is_training: bool
    ) -> Tensor:
        """See Chooser; raises Refusal outside training unless `at_eval` has another way."""
        if not is_training:
            if self.at_eval == "refuse":
                raise Refusal(NO_EVALUATION)
            return log_scores_NE.topk(self.experts_per_token, dim=-1).indices
        rows, length = told(facts).ids_BT.shape
        num_experts = log_scores_NE.shape[-1]
        scores_BET = log_scores_NE.view(rows, length, num_experts).transpose(1, 2)
        is_real_BT = told(facts).is_real_BT
        if is_real_BT is not None:
            scores_BET = scores_BET.masked_fill(~is_real_BT[:, None], -torch.inf)
        best = scores_BET.topk(self.tokens_per_expert(length, num_experts), dim=-1).indices
        is_taken_BET = torch.zeros_like(scores_BET, dtype=torch.bool).scatter_(-1, best, True)
        if is_real_BT is not None:
            is_taken_BET &= is_real_BT[:, None]
        experts_E = torch.arange(num_experts, device=log_scores_NE.device)
        return torch.where(is_taken_BET.transpose(1, 2).reshape_as(log_scores_NE), experts_E, num_experts)

    def tokens_per_expert(self, length: int, num_experts: int) -> int:
        """How many tokens of a row each expert takes: so many that a token meets K experts on average."""
        return -(-length * self.experts_per_token // num_experts)


NO_EVALUATION = (
    'model.moe.router.at_eval="refuse": expert choice looks at later tokens, which no evaluation or generation may;'
    ' set model.moe.router.at_eval="token_choice" (python -m evals: --at-eval token_choice) to give each token its own'
    " best experts there, or ask for none with evals.tasks=[]"
)


class ControlSettings(Section):
    """What the controls share: the choice ignores the router, which weighs the chosen as kind softmax does.

    So a comparison with softmax isolates what choosing is worth. A balance loss cannot change such a choice but would
    still move the gates: leave it out (`balance = []`).
    """

    kind: str
    normalize: bool = True
    """Whether the gates of a token's chosen experts are scaled to sum to 1."""
    scale: float = Field(default=1.0, gt=0)
    """What the gates are multiplied with in the end."""


class RandomSettings(ControlSettings):
    """K different experts are drawn for every token anew; in evaluation for its id and place."""

    kind: Literal["random"] = "random"


class HashSettings(ControlSettings):
    """K different experts belong to each token id, the same in every run, others in each layer (Roller et al. 2021)."""

    kind: Literal["hash"] = "hash"


class UniformSettings(ControlSettings):
    """Experts take turns along the row, which begins somewhere else in every row: the load is as even as can be."""

    kind: Literal["uniform"] = "uniform"


# What a control draws from: each with a purpose of its own and a number for each token.
DRAWN_FROM = {
    "random": (RANDOM, lambda facts: facts.keys_BT),
    "hash": (HASH, lambda facts: facts.ids_BT),
}


class Drawn:
    """K different experts by the order of random numbers, a function of the token's key or of its id."""

    leaves_gaps = False

    def __init__(self, settings: ControlSettings, experts_per_token: int, layer: int) -> None:
        self.experts_per_token, self.layer = experts_per_token, layer
        self.purpose, self.numbers_of = DRAWN_FROM[settings.kind]

    def choose(
        self, log_scores_NE: Tensor, bias_E: Tensor | None, facts: TokenFacts | None, is_training: bool
    ) -> Tensor:
        """See Chooser."""
        experts_E = torch.arange(log_scores_NE.shape[-1], device=log_scores_NE.device)
        numbers_N = self.numbers_of(told(facts)).reshape(-1, 1)
        draws_NE = mix(numbers_N, self.layer, self.purpose, experts_E)
        return draws_NE.topk(self.experts_per_token, dim=-1).indices


class InTurn:
    """The token at place t of its row takes the K experts from t*K on, counted round and from the row's own start."""

    leaves_gaps = False

    def __init__(self, settings: ControlSettings, experts_per_token: int, layer: int) -> None:
        self.experts_per_token, self.layer = experts_per_token, layer

    def choose(
        self, log_scores_NE: Tensor, bias_E: Tensor | None, facts: TokenFacts | None, is_training: bool
    ) -> Tensor:
        """See Chooser."""
        places_BT, row_keys_B = told(facts).places_BT, told(facts).row_keys_B
        turns_BT = places_BT * self.experts_per_token
        if row_keys_B is not None:
            # Reduced before it is added: a sum that overflows would break the turn.
            turns_BT = turns_BT + mix(row_keys_B[:, None], self.layer, TURN) % log_scores_NE.shape[-1]
        steps_K = torch.arange(self.experts_per_token, device=log_scores_NE.device)
        return (turns_BT.reshape(-1, 1) + steps_K) % log_scores_NE.shape[-1]


def told(facts: TokenFacts | None) -> TokenFacts:
    """The facts, where they cannot be done without."""
    assert facts is not None, "this router has to be told of its tokens: pass TokenFacts"
    return facts
