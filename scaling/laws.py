"""Laws of the loss, each a sum of powers: log L = s * logsumexp of terms that are linear in the coefficients.

So one fitter has the exact gradient of all of them. Where a law has no power over its sum, s = 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from scaling.runs import Column, Runs

LARGEST_EXPANSION = 512.0
"""Beyond which more experts bring nothing: E_max of Clark et al. 2022, section 5.3."""

Starts = Mapping[str, tuple[float, ...]]
OFFSETS = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
FLOORS = (-1.0, -0.5, 0.0, 0.5, 1.0)
POWERS = (0.0, 0.5, 1.0, 1.5, 2.0)
"""The grid of Hoffmann et al. 2022, appendix D.3, and of Besiroglu et al. 2024."""
SMALL = (-0.2, 0.0, 0.2)


@dataclass(frozen=True)
class Law:
    """A form of the loss, told apart from its coefficients theta_K: logarithms of factors, and powers as they are."""

    name: str
    formula: str
    source: str
    starts: Starts
    """The coefficients, in order, and where a search for each begins."""
    terms: Callable[[Runs], np.ndarray]
    """(T, R, K): the factor of each coefficient in the logarithm of each term, for each run."""
    offsets: Callable[[Runs], np.ndarray] | None = None
    """(T, R) to add to the logarithms of the terms, where that is."""
    power: str | None = None
    """The coefficient that the whole sum is raised to."""
    shown: Callable[[Mapping[str, float]], dict[str, float]] = dict
    """The coefficients as their paper writes them."""

    @property
    def has_optimum(self) -> bool:
        """Whether it weighs size against tokens, so that a budget has a best size."""
        return {"alpha", "beta"} <= set(self.starts) or {"log n", "log d"} <= set(self.starts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.starts)

    def log_loss(self, theta_K: np.ndarray, runs: Runs) -> tuple[Column, np.ndarray]:
        """log L of each run, (R,), and its gradient by the coefficients, (R, K)."""
        return log_loss(theta_K, self.terms(runs), self._offsets(runs), self._power_place)

    def loss(self, theta_K: np.ndarray, runs: Runs) -> Column:
        """Nats a token of each run, (R,)."""
        return np.exp(self.log_loss(theta_K, runs)[0])

    def _offsets(self, runs: Runs) -> np.ndarray | float:
        return 0.0 if self.offsets is None else self.offsets(runs)

    @property
    def _power_place(self) -> int | None:
        return None if self.power is None else self.names.index(self.power)


def log_loss(
    theta_K: np.ndarray, terms_TRK: np.ndarray, offsets_TR: np.ndarray | float, power: int | None
) -> tuple[Column, np.ndarray]:
    """See `Law.log_loss`; power: the place of the coefficient that the sum is raised to."""
    logs_TR = terms_TRK @ theta_K + offsets_TR
    largest_R = logs_TR.max(0)
    parts_TR = np.exp(logs_TR - largest_R)
    sum_R = parts_TR.sum(0)
    log_R = largest_R + np.log(sum_R)
    gradient_RK = ((parts_TR / sum_R)[:, :, None] * terms_TRK).sum(0)
    if power is None:
        return log_R, gradient_RK
    gradient_RK = theta_K[power] * gradient_RK
    gradient_RK[:, power] += log_R
    return theta_K[power] * log_R, gradient_RK


def _stack(runs: Runs, *terms: tuple[Column | float, ...]) -> np.ndarray:
    """(T, R, K) from the factors of each term."""
    return np.stack([np.stack([np.broadcast_to(factor, (len(runs),)) for factor in term], -1) for term in terms])


def _chinchilla(runs: Runs) -> np.ndarray:
    n, d = np.log(runs.active_R), np.log(runs.tokens_R)
    return _stack(runs, (1, 0, 0, -n, 0), (0, 1, 0, 0, -d), (0, 0, 1, 0, 0))


def log_expansion(runs: Runs) -> Column:
    """ln of the expansion that counts: E as it is where it is small, bounded where it is large (Clark et al. 2022)."""
    low, high = 1.0, LARGEST_EXPANSION
    return -np.log(1 / (runs.expansion_R - 1 + 1 / (1 / low - 1 / high)) + 1 / high)


def _joint(runs: Runs) -> np.ndarray:
    n, d, e = np.log(runs.active_R), np.log(runs.tokens_R), log_expansion(runs)
    return _stack(
        runs, (1, 0, 0, -n, 0, e, 0, -e * n, 0), (0, 1, 0, 0, -d, 0, e, 0, -e * d), (0, 0, 1, 0, 0, 0, 0, 0, 0)
    )


def _routed(runs: Runs) -> np.ndarray:
    n, e = np.log(runs.active_R), log_expansion(runs)
    return _stack(runs, (1, -n, -e, e * n))


def _factors(theta: Mapping[str, float]) -> dict[str, float]:
    """Coefficients whose names begin with "log " without their logarithm."""
    return {
        name.removeprefix("log "): float(np.exp(value)) if name.startswith("log ") else value
        for name, value in theta.items()
    }


def _kaplan(theta: Mapping[str, float]) -> dict[str, float]:
    """N_c and D_c are where the powers of their terms would be 1."""
    told: dict[str, float] = {}
    if "alpha_N/alpha_D" in theta:
        told["alpha_N"] = theta["alpha_N/alpha_D"] * theta["alpha_D"]
        told["alpha_D"] = theta["alpha_D"]
        told["N_c"] = float(np.exp(theta["log n"] / theta["alpha_N/alpha_D"]))
        told["D_c"] = float(np.exp(theta["log d"]))
        return told
    (factor, power) = theta
    letter = power.removeprefix("alpha_")
    return {power: theta[power], f"{letter}_c": float(np.exp(theta[factor] / theta[power]))}


LAWS = {
    law.name: law
    for law in (
        Law(
            "chinchilla",
            "L = E + A / N^alpha + B / D^beta",
            "Hoffmann et al. 2022, section 3.3",
            {"log A": OFFSETS, "log B": OFFSETS, "log E": FLOORS, "alpha": POWERS, "beta": POWERS},
            _chinchilla,
            shown=_factors,
        ),
        Law(
            "kaplan",
            "L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
            "Kaplan et al. 2020, equation 1.5; there N is without embeddings",
            {
                "log n": (5.0, 15.0, 25.0),
                "log d": (10.0, 20.0, 30.0),
                "alpha_N/alpha_D": (0.5, 0.75, 1.0),
                "alpha_D": (0.05, 0.1, 0.3),
            },
            lambda runs: _stack(runs, (1, 0, -np.log(runs.active_R), 0), (0, 1, 0, 0)),
            offsets=lambda runs: np.stack([np.zeros(len(runs)), -np.log(runs.tokens_R)]),
            power="alpha_D",
            shown=_kaplan,
        ),
        Law(
            "kaplan_parameters",
            "L = (N_c / N)^alpha_N",
            "Kaplan et al. 2020, equation 1.1; runs that tokens do not limit",
            {"log n": (0.0, 2.0, 4.0), "alpha_N": (0.05, 0.1, 0.3)},
            lambda runs: _stack(runs, (1, -np.log(runs.active_R))),
            shown=_kaplan,
        ),
        Law(
            "kaplan_tokens",
            "L = (D_c / D)^alpha_D",
            "Kaplan et al. 2020, equation 1.2; runs that parameters do not limit",
            {"log d": (0.0, 2.0, 4.0), "alpha_D": (0.05, 0.1, 0.3)},
            lambda runs: _stack(runs, (1, -np.log(runs.tokens_R))),
            shown=_kaplan,
        ),
        Law(
            "joint_moe",
            "L = c + a E^delta / N^(alpha + gamma ln E) + b E^omega / D^(beta + zeta ln E), E the expansion, bounded",
            "Ludziejewski et al. 2025, section 4.1; N active parameters. Signs of alpha, beta, gamma and zeta are ours",
            {
                **{"log a": OFFSETS, "log b": OFFSETS, "log c": FLOORS, "alpha": POWERS, "beta": POWERS},
                **{"delta": SMALL, "omega": SMALL, "gamma": (0.0,), "zeta": (0.0,)},
            },
            _joint,
            shown=_factors,
        ),
        Law(
            "routed",
            "log L = log f - a log N - b log E + c log N log E, E the expansion, bounded",
            "Clark et al. 2022, equation 2; N active parameters, tokens all alike",
            {"log f": (0.0, 2.0, 4.0), "a": (0.05, 0.1, 0.3), "b": (0.0, 0.1), "c": (0.0, 0.01)},
            _routed,
            shown=_factors,
        ),
    )
}
