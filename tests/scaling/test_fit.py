"""Laws are found again in what they made, their gradients are exact, and runs that cannot tell are refused."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import check_grad

from scaling.fit import bootstrap, fit, intervals
from scaling.laws import LAWS, Law
from scaling.runs import Runs, read_csv
from scaling.sets import SETS, advise, best_size, step_law_batch, step_law_rate
from settings import Refusal

TRUE = {
    "chinchilla": (6.17, 7.67, 0.6, 0.347, 0.367),
    "kaplan": (24.2, 30.5, 0.74, 0.103),
    "kaplan_parameters": (2.4, 0.076),
    "kaplan_tokens": (3.0, 0.095),
    "joint_moe": (5.0, 6.0, 0.4, 0.3, 0.32, -0.2, 0.15, -0.01, 0.02),
    "routed": (2.5, 0.08, 0.1, 0.009),
}


def drawn_runs(count: int = 60, seed: int = 0) -> Runs:
    draws = np.random.default_rng(seed)
    expansion = draws.choice([1, 2, 4, 8, 16, 64], count)
    active = np.exp(draws.uniform(np.log(1e7), np.log(3e9), count))
    tokens = np.exp(draws.uniform(np.log(3e8), np.log(3e11), count))
    return Runs.of(active, tokens, np.ones(count), active * expansion, expansion)


def obeying(law: Law, theta: tuple[float, ...], noise: float = 0.0, count: int = 60) -> Runs:
    runs = drawn_runs(count)
    error = np.exp(noise * np.random.default_rng(1).standard_normal(count))
    return Runs(runs.active_R, runs.tokens_R, law.loss(np.array(theta), runs) * error, runs.total_R, runs.expansion_R)


@pytest.mark.parametrize("name", LAWS)
def test_a_law_is_found_again_in_what_it_made(name: str) -> None:
    law, theta = LAWS[name], TRUE[name]
    runs = obeying(law, theta)
    found = fit(law, runs, starts=60)
    assert found.objective < 1e-9
    assert np.allclose(found.loss(runs), runs.loss_R, rtol=1e-4)
    tolerance = 0.02 if name != "joint_moe" else 0.15  # nine coefficients, of which some nearly make up for others
    assert found.coefficients == pytest.approx(
        law.shown(dict(zip(law.names, theta, strict=True))), rel=tolerance, abs=0.01
    )


@pytest.mark.parametrize("name", LAWS)
def test_the_gradient_is_exact(name: str) -> None:
    law, runs = LAWS[name], drawn_runs(5)
    for place in range(len(runs)):
        one = runs.take(np.array([place]))
        error = check_grad(
            lambda theta, one=one: float(law.log_loss(theta, one)[0][0]),
            lambda theta, one=one: law.log_loss(theta, one)[1][0],
            np.array(TRUE[name]),
        )
        assert error < 1e-5


def test_intervals_hold_the_truth_and_narrow_with_less_noise() -> None:
    law = LAWS["chinchilla"]
    widths = []
    for noise in (0.01, 0.002):
        runs = obeying(law, TRUE["chinchilla"], noise, count=120)
        best = fit(law, runs, starts=40)
        ranges = intervals(law, bootstrap(best, runs, rounds=60))
        low, high = ranges["alpha"]
        assert low < 0.347 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_one_run_far_off_moves_little() -> None:
    law = LAWS["chinchilla"]
    runs = obeying(law, TRUE["chinchilla"], noise=0.002)
    runs.loss_R[7] *= 1.5
    assert fit(law, runs, starts=40).coefficients["alpha"] == pytest.approx(0.347, abs=0.03)


def test_what_cannot_be_told_apart_is_refused() -> None:
    runs = drawn_runs(4)
    with pytest.raises(Refusal, match="4 runs cannot determine the 5 coefficients of 'chinchilla'"):
        fit(LAWS["chinchilla"], runs)
    dense = Runs.of(*(getattr(drawn_runs(), f"{name}_R") for name in ("active", "tokens", "loss")))
    with pytest.raises(Refusal, match=r"vary too little for 'joint_moe': .* fit another law"):
        fit(LAWS["joint_moe"], dense)
    same_size = Runs.of(np.full(20, 1e8), drawn_runs(20).tokens_R, np.ones(20))
    with pytest.raises(Refusal, match="vary too little for 'chinchilla'"):
        fit(LAWS["chinchilla"], same_size)


def test_the_optimum_is_where_the_closed_form_has_it() -> None:
    law = LAWS["chinchilla"]
    best = fit(law, obeying(law, TRUE["chinchilla"]), starts=30)
    told = best.coefficients
    ratio = told["alpha"] * told["A"] / (told["beta"] * told["B"])
    power = told["beta"] / (told["alpha"] + told["beta"])
    expected = ratio ** (1 / (told["alpha"] + told["beta"])) * (1e21 / 6) ** power
    assert best_size(best, 1e21) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "ratios"), [("epoch", (21.4, 17.9)), ("hoffmann", (33.9, 58.9)), ("hoffmann_rounded", (50.1, 92.6))]
)
def test_tokens_a_parameter_by_each_set(name: str, ratios: tuple[float, float]) -> None:
    """Worked out by hand from each paper's coefficients at 1e21 and at Chinchilla's own 5.76e23 FLOPs."""
    for flops, ratio in zip((1e21, 5.76e23), ratios, strict=True):
        advice = advise(flops, SETS[name])
        assert advice.tokens / advice.parameters == pytest.approx(ratio, abs=0.06)
        assert 6 * advice.parameters * advice.tokens == pytest.approx(flops)
        near = [SETS[name].loss(advice.parameters * f, advice.tokens / f) for f in (0.98, 1.0, 1.02)]
        assert min(near) == near[1] == advice.loss


def test_batch_and_rate_of_a_billion_on_a_hundred() -> None:
    """Step Law's own example sizes, by hand: 0.58 * (1e11)^0.571, 1.79 * (1e9)^-0.713 * (1e11)^0.307."""
    assert step_law_batch(1e11) == pytest.approx(1.108e6, rel=0.01)
    assert step_law_rate(1e9, 1e11) == pytest.approx(1.626e-3, rel=0.01)


def test_runs_are_read_by_what_their_columns_are_called(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("Model Size,Training FLOP,color,loss\n1e8,1.2e18,red,3.5\n\n2e8,2.4e18,blue,3.2\n")
    runs = read_csv(path)
    assert runs.tokens_R.tolist() == [2e9, 2e9] and runs.active_R.tolist() == [1e8, 2e8]
    assert runs.without_highest(1).loss_R.tolist() == [3.2]
    assert runs.flops_R.tolist() == pytest.approx([1.2e18, 2.4e18])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no runs"),
        ("n,loss\n1e8,3\n", "no column of tokens; its columns are n, loss"),
        ("n,d,loss\n1e8,1e9,x\n", "line 2: loss='x' has to be a number above 0"),
        ("n,d,loss\n1e8,1e9\n", "line 2: loss='' has to be a number above 0"),
        ("n,d,loss\n1e8,-1,3\n", "line 2: d='-1'"),
        ("n,d,loss\n1e8,inf,3\n", "line 2: d='inf'"),
    ],
)
def test_a_file_that_holds_no_runs_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(Refusal, match=said):
        read_csv(path)
    with pytest.raises(Refusal, match="cannot be read"):
        read_csv(tmp_path / "none.csv")
