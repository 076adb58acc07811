"""Published coefficients by name, and where the optimum lies that they speak of."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scaling.fit import Fit
from scaling.laws import LAWS, Law
from scaling.runs import FLOPS_PER_PARAMETER, Runs
from settings import Refusal

DEFAULT_SET = "epoch"
SMALLEST = 1e3
"""Parameters, and tokens, below which no optimum is looked for."""
GRID, ROUNDS = 60, 8
"""Of the search for an optimum: 60 sizes, then 60 between the neighbours of the best, to a width of 1e-9."""


@dataclass(frozen=True)
class CoefficientSet:
    """Coefficients of Chinchilla's form: L = E + A / N^alpha + B / D^beta."""

    name: str
    source: str
    A: float
    B: float
    E: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        return float(self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta)

    @property
    def exponent(self) -> float:
        """The optimal size grows with FLOPs to this power."""
        return self.beta / (self.alpha + self.beta)

    def best_size(self, flops: float) -> float:
        """Parameters that give the least loss for so many FLOPs, 6ND (Hoffmann et al. 2022, equation 4)."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        return float(ratio ** (1 / (self.alpha + self.beta)) * (flops / FLOPS_PER_PARAMETER) ** self.exponent)


SETS = {
    each.name: each
    for each in (
        CoefficientSet(
            "epoch",
            "240 of the 245 runs that Besiroglu et al. 2024 read off Hoffmann's figure 4, fitted again by us"
            " (theirs: A 482.01, B 2085.43, E 1.8172, alpha 0.3478, beta 0.3658)",
            477.826,
            2143.417,
            1.817218,
            0.347310,
            0.367172,
        ),
        CoefficientSet(
            "hoffmann",
            "Hoffmann et al. 2022, from the TeX source of the paper; too few of their searches ended where they should",
            float(np.exp(6.0073404)),
            float(np.exp(6.0179186)),
            float(np.exp(0.5267228)),
            0.33917084,
            0.2849083,
        ),
        CoefficientSet(
            "hoffmann_rounded",
            "Hoffmann et al. 2022, as printed in section 3.3; rounding moves its optimum: here to compare with",
            406.4,
            410.7,
            1.69,
            0.34,
            0.28,
        ),
    )
}


class Advice(NamedTuple):
    """What to train for a number of FLOPs, 6ND."""

    parameters: float
    tokens: float
    loss: float
    batch_tokens: float
    learning_rate: float


def coefficient_set(name: str) -> CoefficientSet:
    """By name; raises Refusal with the known ones."""
    if name not in SETS:
        raise Refusal(f"no set of coefficients {name!r}; known: {', '.join(SETS)}")
    return SETS[name]


def advise(flops: float, coefficients: CoefficientSet) -> Advice:
    """Size and tokens of least loss, and the batch and rate that others found for them.

    Batch and peak rate are Li et al. 2025 (Step Law, equation 1): 0.58 D^0.571 tokens and 1.79 N^-0.713 D^0.307, over
    dense models and mixtures of 60M to 1B parameters; far from these sizes they are a place to begin a sweep.
    """
    parameters = coefficients.best_size(flops)
    tokens = flops / (FLOPS_PER_PARAMETER * parameters)
    return Advice(
        parameters,
        tokens,
        coefficients.loss(parameters, tokens),
        step_law_batch(tokens),
        step_law_rate(parameters, tokens),
    )


def step_law_batch(tokens: float) -> float:
    """Tokens of a step, for so many in all."""
    return float(0.58 * tokens**0.571)


def step_law_rate(parameters: float, tokens: float) -> float:
    """Peak learning rate for parameters without embeddings."""
    return float(1.79 * parameters**-0.713 * tokens**0.307)


def best_size(best: Fit, flops: float, expansion: float = 1.0) -> float:
    """Active parameters of least loss by any fitted law that has an optimum, for so many FLOPs, 6ND."""
    return float(best_sizes(best.law, best.theta_K, np.array([flops]), expansion)[0])


def best_sizes(law: Law, theta_K: np.ndarray, flops_B: np.ndarray, expansion: float = 1.0) -> np.ndarray:
    """The same for many budgets, (B,): a grid of sizes that closes in on the lowest loss, as laws have one valley."""
    most_B = np.maximum(flops_B / FLOPS_PER_PARAMETER / SMALLEST, 2 * SMALLEST)
    low_B, high_B = np.full(len(flops_B), np.log(SMALLEST)), np.log(most_B)
    for _ in range(ROUNDS):
        log_size_BG = np.linspace(low_B, high_B, GRID, axis=-1)
        size_R = np.exp(log_size_BG).ravel()
        tokens_R = np.repeat(flops_B / FLOPS_PER_PARAMETER, GRID) / size_R
        runs = Runs.of(size_R, tokens_R, np.ones_like(size_R), None, np.full_like(size_R, expansion))
        lowest_B = law.loss(theta_K, runs).reshape(-1, GRID).argmin(-1)
        rows = np.arange(len(flops_B))
        low_B, high_B = (log_size_BG[rows, (lowest_B + side).clip(0, GRID - 1)] for side in (-1, 1))
    return np.exp((low_B + high_B) / 2)


def set_of(best: Fit, name: str, source: str) -> CoefficientSet:
    """A fit of Chinchilla's law as a set; raises Refusal for another law."""
    if best.law is not LAWS["chinchilla"]:
        raise Refusal(f"a set of coefficients is of the law 'chinchilla', not of {best.law.name!r}")
    told = best.coefficients
    return CoefficientSet(name, source, told["A"], told["B"], told["E"], told["alpha"], told["beta"])
