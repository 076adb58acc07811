"""Fitting a law to runs, from many starts, and how far its coefficients are to be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize

from scaling.laws import Law, log_loss
from scaling.runs import Runs
from settings import Refusal

DELTA = 1e-3
"""Of the Huber loss on log L (Hoffmann et al. 2022, equation 3): beyond 0.1% an error counts by its size alone."""
STARTS = 300


@dataclass(frozen=True)
class Fit:
    """A law with coefficients."""

    law: Law
    theta_K: np.ndarray
    objective: float
    """Sum of Huber losses over the runs; `delta` goes with it."""
    num_runs: int
    delta: float = DELTA

    @property
    def coefficients(self) -> dict[str, float]:
        """As the law's paper writes them."""
        return self.law.shown(dict(zip(self.law.names, map(float, self.theta_K), strict=True)))

    def loss(self, runs: Runs) -> np.ndarray:
        """Nats a token of each run, (R,)."""
        return self.law.loss(self.theta_K, runs)


def fit(law: Law, runs: Runs, *, delta: float = DELTA, starts: int = STARTS, seed: int = 0) -> Fit:
    """The best of so many searches, begun at places of the law's grid that are drawn by the seed.

    The sum, not the mean, of errors is minimised and searched to its last digits: stopping early is what made
    published coefficients wrong (Besiroglu et al. 2024). Raises Refusal for fewer runs than coefficients.
    """
    check(law, runs)
    found = [_search(law, runs, np.array(start), delta) for start in _drawn(law, starts, seed)]
    objective, theta_K = min(found, key=lambda pair: pair[0])
    return Fit(law, theta_K, objective, len(runs), delta)


def check(law: Law, runs: Runs) -> None:
    """Raises Refusal where the runs cannot determine the law."""
    count = len(law.names)
    if len(runs) <= count:
        raise Refusal(f"{len(runs)} runs cannot determine the {count} coefficients of {law.name!r}; give more of them")
    inner = [place for place, name in enumerate(law.names) if name != law.power]
    slopes = np.concatenate(law.terms(runs)[:, :, inner])
    rank = int(np.linalg.matrix_rank(slopes / np.maximum(np.linalg.norm(slopes, axis=0), 1e-300)))
    if rank < len(inner):
        raise Refusal(
            f"these runs vary too little for {law.name!r}: of its {count} coefficients {len(inner) - rank} cannot be"
            " told apart from others; add runs of other sizes, tokens or expansions, or fit another law"
        )
    if np.ptp(np.log(runs.loss_R)) < 1e-9:
        raise Refusal(f"these {len(runs)} runs all have the loss {runs.loss_R[0]:g}: there is nothing to fit")


def _drawn(law: Law, count: int, seed: int) -> Sequence[tuple[float, ...]]:
    grid = list(product(*law.starts.values()))
    if len(grid) <= count:
        return grid
    return [grid[place] for place in np.random.default_rng(seed).choice(len(grid), count, replace=False)]


def _search(law: Law, runs: Runs, start_K: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
    """(objective, coefficients) where a search from one start ends."""
    terms_TRK, offsets_TR, power = law.terms(runs), law._offsets(runs), law._power_place
    log_loss_R = np.log(runs.loss_R)

    def objective(theta_K: np.ndarray) -> tuple[float, np.ndarray]:
        log_R, gradient_RK = log_loss(theta_K, terms_TRK, offsets_TR, power)
        error_R = log_R - log_loss_R
        bounded_R = error_R.clip(-delta, delta)
        return float((bounded_R * (error_R - bounded_R / 2)).sum()), bounded_R @ gradient_RK

    with np.errstate(over="ignore", invalid="ignore"):
        options = {"maxiter": 3000, "maxfun": 10_000, "ftol": 1e-15, "gtol": 1e-10}
        result = minimize(objective, start_K, jac=True, method="L-BFGS-B", options=options)
    return (float(result.fun), result.x) if np.isfinite(result.fun) else (np.inf, start_K)


def bootstrap(best: Fit, runs: Runs, *, rounds: int = 200, seed: int = 0) -> np.ndarray:
    """Coefficients of fits to runs drawn anew with replacement: (B, K). Each search begins at the best fit."""
    draws = np.random.default_rng(seed)
    drawn = (runs.take(draws.integers(len(runs), size=len(runs))) for _ in range(rounds))
    return np.array([_search(best.law, some, best.theta_K, best.delta)[1] for some in drawn])


def intervals(law: Law, thetas_BK: np.ndarray, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the coefficients as they are shown."""
    shown = [law.shown(dict(zip(law.names, map(float, theta_K), strict=True))) for theta_K in thetas_BK]
    tails = (50 * (1 - level), 100 - 50 * (1 - level))
    return {
        name: tuple(float(bound) for bound in np.percentile([told[name] for told in shown], tails))  # type: ignore[misc]
        for name in shown[0]
    }
