"""One picture of a fit: how near the law comes to each run, and the size that it advises for each budget."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scaling.fit import Fit
from scaling.runs import Runs
from scaling.sets import best_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID, LINE, BAND = "#22272e", "#6b7480", "#e3e6ea", "#3f7fd0", "#3f7fd033"


def draw(best: Fit, runs: Runs, thetas_BK: np.ndarray, path: Path) -> None:
    """Write a PNG. thetas_BK: coefficients of the bootstrap, for the band of 95% around the advice; none, no band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_errors(left, best, runs)
    _draw_advice(right, best, runs, thetas_BK)
    figure.savefig(path, format="png")


def _draw_errors(axes: "Axes", best: Fit, runs: Runs) -> None:
    predicted_R = best.loss(runs)
    points = axes.scatter(predicted_R, runs.loss_R, c=np.log10(runs.flops_R), s=14, cmap="viridis", linewidths=0)
    ends = [min(predicted_R.min(), runs.loss_R.min()), max(predicted_R.max(), runs.loss_R.max())]
    axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle="--")
    _style(axes, f"{best.law.name}: {len(runs)} runs", "loss by the law (nats a token)", "loss measured")
    bar = axes.figure.colorbar(points, ax=axes, pad=0.02, aspect=28)
    bar.set_label("log10 FLOPs", fontsize=9, color=FAINT)
    bar.ax.tick_params(labelsize=8.5, colors=FAINT)


def _draw_advice(axes: "Axes", best: Fit, runs: Runs, thetas_BK: np.ndarray) -> None:
    flops_B = np.geomspace(runs.flops_R.min(), runs.flops_R.max() * 100, 25)
    axes.scatter(runs.flops_R, runs.active_R, s=7, color=FAINT, alpha=0.5, linewidths=0, label="runs")
    expansions = np.unique(runs.expansion_R) if best.law.has_optimum else np.array([])
    for place, expansion in enumerate(expansions):
        name = "least loss" if len(expansions) == 1 else f"least loss, expansion {expansion:g}"
        axes.plot(flops_B, best_sizes(best.law, best.theta_K, flops_B, float(expansion)), label=name, color=f"C{place}")
    if len(expansions) == 1 and len(thetas_BK):
        sizes = np.array([best_sizes(best.law, theta_K, flops_B) for theta_K in thetas_BK])
        low, high = np.percentile(sizes, (2.5, 97.5), axis=0)
        axes.fill_between(flops_B, low, high, color=BAND, linewidth=0, label="95%")
    axes.axvspan(runs.flops_R.max(), flops_B[-1], color=GRID, alpha=0.5, linewidth=0, label="beyond the runs")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(flops_B[0], flops_B[-1])
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    _style(axes, "active parameters by budget", "FLOPs, 6ND", "parameters")


def _style(axes: "Axes", title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, weight="bold")
    axes.set_xlabel(x_label, fontsize=9, color=FAINT)
    axes.set_ylabel(y_label, fontsize=9, color=FAINT)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, colors=FAINT)
