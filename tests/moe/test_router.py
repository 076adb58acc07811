"""Who is chosen and how much it counts, against formulas written out; what may not change it."""

import pytest
import torch
from pydantic import TypeAdapter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moe.capacity import CapacitySettings
from moe.router import Extras, NullSettings, Router, RouterSettings, evaluation_refusal, log_sqrt_softplus
from moe.routing import Memo, TokenFacts, count_rows

WIDTH = 16
SCORES = ["softmax", "sigmoid", "sqrt_softplus"]
CONTROLS = ["random", "hash", "uniform"]
KINDS = [*SCORES, "expert_choice", *CONTROLS]


def settings_of(kind, **changes):
    return TypeAdapter(RouterSettings).validate_python({"kind": kind, **changes})


def build(kind="softmax", num_experts=8, experts_per_token=2, *, std=1.0, has_bias=False, extras=None, **changes):
    torch.manual_seed(0)
    settings = settings_of(kind, **changes)
    router = Router(settings, WIDTH, num_experts, experts_per_token, has_bias=has_bias, extras=extras or Extras())
    torch.nn.init.normal_(router.weight, std=std)
    return router, torch.randn(64, WIDTH)


def facts_of(rows=4, length=16, padding=0):
    """Facts of `rows` rows with keys, the last `padding` tokens of each not real."""
    generator = torch.Generator().manual_seed(rows)
    ids_BT = torch.randint(50, (rows, length), generator=generator)
    is_real_BT = torch.arange(length).expand(rows, -1) < length - padding if padding else None
    keys_B = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    return TokenFacts(ids_BT, torch.arange(length).expand(rows, -1), keys_B, is_real_BT)


def part_of(facts, rows, tokens=slice(None)):
    is_real_BT = None if facts.is_real_BT is None else facts.is_real_BT[rows, tokens]
    keys_B = None if facts.row_keys_B is None else facts.row_keys_B[rows]
    return TokenFacts(facts.ids_BT[rows, tokens], facts.places_BT[rows, tokens], keys_B, is_real_BT)


def test_sigmoid_gates_are_the_scores_of_the_chosen_over_their_sum():
    router, x_ND = build("sigmoid", scale=2.5)
    stats = router(x_ND)
    chosen_scores = torch.sigmoid(stats.logits_NE).gather(1, stats.chosen_NK)
    torch.testing.assert_close(stats.gates_NK, 2.5 * chosen_scores / chosen_scores.sum(1, keepdim=True))
    scores_NE = torch.sigmoid(stats.logits_NE)
    torch.testing.assert_close(stats.probabilities_NE, scores_NE / scores_NE.sum(1, keepdim=True))


def scores_of(kind, logits_NE):
    by_hand = {"sigmoid": logits_NE.sigmoid(), "sqrt_softplus": torch.nn.functional.softplus(logits_NE).sqrt()}
    return by_hand.get(kind, logits_NE.softmax(1))


@pytest.mark.parametrize("kind", [*SCORES, *CONTROLS])
def test_gates_left_alone_are_the_scores_themselves(kind):
    router, x_ND = build(kind, normalize=False)
    stats = router(x_ND, facts_of())
    torch.testing.assert_close(stats.gates_NK, scores_of(kind, stats.logits_NE).gather(1, stats.chosen_NK))


@pytest.mark.parametrize("kind", SCORES)
def test_vanishing_scores_still_share_out_the_whole(kind):
    """Scores below any epsilon must not shrink the gates: the router could hide from the balance loss there."""
    router, x_ND = build(kind, std=0.0)
    stats = Router.forward(router, x_ND)
    torch.testing.assert_close(stats.gates_NK, torch.full_like(stats.gates_NK, 0.5))
    router.weight.data[:] = -60.0
    stats = router(torch.ones(4, WIDTH))
    torch.testing.assert_close(stats.gates_NK.sum(1), torch.ones(4))
    torch.testing.assert_close(stats.probabilities_NE.sum(1), torch.ones(4))


def test_log_of_sqrt_softplus_is_exact_and_its_gradient_finite_everywhere():
    logits = [-1e4, -700.0, -100.0, -40.5, -40.0, -39.5, -20.0, -1.0, 0.0, 3.0, 19.0, 21.0, 1e4]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        x = torch.tensor(logits, dtype=dtype, requires_grad=True)
        ours = log_sqrt_softplus(x)
        ours.sum().backward()
        exact = torch.tensor(logits, dtype=torch.float64)
        # log(log1p(e^x)) by its series where e^x is small, and by log1p where it is not.
        power = exact.clamp(max=-20).exp()
        series = exact - power / 2 + 5 * power.square() / 24
        direct = (exact.clamp(min=0) + (-exact.abs()).exp().log1p()).clamp(min=1e-300).log()
        expected = torch.where(exact < -20, series, direct) / 2
        assert ((ours.double() - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all(), dtype
        assert x.grad.isfinite().all() and (x.grad > 0).all()
    torch.testing.assert_close(x.grad[:4], torch.full((4,), 0.5, dtype=torch.float64))
    points = torch.linspace(-60, 60, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_sqrt_softplus, [points])


@pytest.mark.parametrize("kind", SCORES)
def test_bias_chooses_but_never_weighs(kind):
    router, x_ND = build(kind, has_bias=True)
    before = router(x_ND)
    router.bias_E[3] = 10.0
    after = router(x_ND)
    assert (after.chosen_NK[:, 0] == 3).all() and not (before.chosen_NK[:, 0] == 3).all()
    scores_NK = scores_of(kind, after.logits_NE).gather(1, after.chosen_NK)
    torch.testing.assert_close(after.gates_NK, scores_NK / scores_NK.sum(1, keepdim=True))
    assert torch.equal(after.probabilities_NE, before.probabilities_NE)


@pytest.mark.parametrize("kind", SCORES)
def test_a_bias_of_nothing_changes_nothing(kind):
    (without, x_ND), (with_bias, _) = build(kind), build(kind, has_bias=True)
    assert "bias_E" in with_bias.state_dict() and "bias_E" not in without.state_dict()
    assert torch.equal(without(x_ND).chosen_NK, with_bias(x_ND).chosen_NK)
    assert torch.equal(without(x_ND).gates_NK, with_bias(x_ND).gates_NK)


def test_jitter_moves_each_channel_of_the_input_in_training_only():
    (plain, x_ND), (jittered, _) = build(), build(jitter=0.25)
    facts = facts_of()
    moved = jittered(x_ND, facts).logits_NE
    assert not torch.allclose(moved, plain(x_ND, facts).logits_NE)
    assert torch.equal(jittered(x_ND, facts).logits_NE, moved)
    assert torch.equal(jittered.eval()(x_ND, facts).logits_NE, plain(x_ND, facts).logits_NE)


def test_jitter_is_uniform_around_one_and_different_everywhere():
    router, _ = build("softmax", WIDTH, jitter=0.25)
    other, _ = build("softmax", WIDTH, jitter=0.25, extras=Extras(layer=1))
    for one in (router, other):
        one.weight.data.copy_(torch.eye(WIDTH))  # the logits are then the jitter itself
    facts = facts_of(64, 32)
    factors_ND = router(torch.ones(64 * 32, WIDTH), facts).logits_NE.detach()
    assert factors_ND.min() >= 0.75 and factors_ND.max() < 1.25
    assert factors_ND.mean().item() == pytest.approx(1.0, abs=0.005)
    assert factors_ND.std().item() == pytest.approx(0.5 / 12**0.5, abs=0.005)
    assert factors_ND.unique().numel() > 0.99 * factors_ND.numel()
    others_ND = other(torch.ones(64 * 32, WIDTH), facts).logits_NE.detach()
    assert torch.corrcoef(torch.stack([factors_ND.flatten(), others_ND.flatten()]))[0, 1].abs() < 0.02


def variants():
    """Every kind and feature by itself: (name, arguments of `build`)."""
    yield from ((kind, {"kind": kind}) for kind in KINDS)
    yield "groups", {"kind": "sigmoid", "groups": {"count": 4, "keep": 2}, "has_bias": True}
    yield "jitter", {"kind": "softmax", "jitter": 0.2}
    yield "null", {"kind": "softmax", "extras": Extras(null_experts=NullSettings(count=3, output="copy"))}
    for drop in ("probability", "position"):
        yield drop, {"kind": "softmax", "extras": Extras(capacity=CapacitySettings(factor=0.8, drop=drop))}
    everything = Extras(NullSettings(count=3, output="copy"), CapacitySettings(factor=0.8), layer=3)
    yield "everything", {"kind": "sqrt_softplus", "jitter": 0.1, "has_bias": True, "extras": everything}


VARIANTS = dict(variants())
BY_TOKEN = [name for name in VARIANTS if name not in ("expert_choice", "probability", "position", "everything")]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("padding", [0, 5])
def test_decisions_do_not_depend_on_micro_batches(name, padding):
    router, x_ND = build(**VARIANTS[name])
    facts = facts_of(4, 16, padding)
    whole = router(x_ND, facts)
    for cuts in ([1, 1, 1, 1], [3, 1], [2, 2]):
        ends = torch.tensor(cuts).cumsum(0).tolist()
        parts = [
            router(x_ND.view(4, 16, -1)[end - size : end].flatten(0, 1), part_of(facts, slice(end - size, end)))
            for size, end in zip(cuts, ends, strict=True)
        ]
        for field in ("selected_NK", "chosen_NK"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)), field
        torch.testing.assert_close(torch.cat([part.gates_NK for part in parts]), whole.gates_NK)


@pytest.mark.parametrize("name", BY_TOKEN)
def test_decisions_of_tokens_do_not_depend_on_their_row(name):
    router, x_ND = build(**VARIANTS[name])
    facts, x_BTD = facts_of(4, 16, 5), x_ND.view(4, 16, -1)
    whole = router(x_ND, facts).selected_NK.view(4, 16, -1)
    for cut in (1, 7, 15):
        for tokens in (slice(0, cut), slice(cut, 16)):
            part = router(x_BTD[:, tokens].flatten(0, 1), part_of(facts, slice(None), tokens))
            assert torch.equal(part.selected_NK, whole[:, tokens].flatten(0, 1))


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_is_chosen_by_nobody_and_takes_no_room(name):
    router, x_ND = build(**VARIANTS[name])
    facts = facts_of(4, 16, 5)
    stats, num_scored = router(x_ND, facts), len(router.weight)
    is_padding_N = ~facts.is_real_BT.flatten()
    assert (stats.selected_NK[is_padding_N] == num_scored).all()
    assert (stats.chosen_NK[is_padding_N] == router.num_experts).all()
    assert not stats.gates_NK[is_padding_N].any()
    assert stats.copy_N is None or not stats.copy_N[is_padding_N].any()
    assert torch.equal(stats.is_real_N, ~is_padding_N) and stats.num_real == 44
    # Whatever stands in the padding: nothing of the others changes.
    x_ND = x_ND.clone()
    x_ND[is_padding_N] *= 100
    again = router(x_ND, facts)
    assert torch.equal(again.chosen_NK, stats.chosen_NK)
    torch.testing.assert_close(again.gates_NK, stats.gates_NK)


@pytest.mark.parametrize("name", VARIANTS)
def test_slots_that_go_nowhere_have_no_gate_and_gradients_are_finite(name):
    router, x_ND = build(**VARIANTS[name])
    x_ND.requires_grad_()
    stats = router(x_ND, facts_of(4, 16, 5))
    goes_NK = stats.chosen_NK < router.num_experts
    assert (stats.gates_NK[goes_NK] > 0).all() and not stats.gates_NK[~goes_NK].any()
    assert (goes_NK.sum(0) > 0).any()
    torch.randn_like(stats.gates_NK).mul(stats.gates_NK).sum().backward()
    assert router.weight.grad.isfinite().all() and router.weight.grad.any()
    assert x_ND.grad.isfinite().all() and not x_ND.grad.view(4, 16, -1)[:, 11:].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_second_pass_obeys_the_first(name):
    """A recomputation may see other logits, by rounding or by chance: its choice is that of the first pass."""
    router, x_ND = build(**VARIANTS[name])
    facts, memo = facts_of(4, 16, 5), Memo()
    first = router(x_ND, facts, memo)
    noise_ND = torch.randn_like(x_ND)
    second, free = router(x_ND + noise_ND, facts, memo), router(x_ND + noise_ND, facts)
    assert torch.equal(second.chosen_NK, first.chosen_NK) and torch.equal(second.selected_NK, first.selected_NK)
    assert name in CONTROLS or not torch.equal(free.chosen_NK, first.chosen_NK)
    # Gates are those of the new logits at the old choice.
    goes_NK = second.chosen_NK < router.num_experts
    torch.testing.assert_close(second.gates_NK > 0, goes_NK)
    assert not torch.allclose(second.gates_NK, first.gates_NK)
    second.gates_NK.square().sum().backward()
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_waits_for_the_device(name):
    """Tensors without data cannot be looked at: a forward pass that would, fails."""
    with FakeTensorMode():
        router, x_ND = build(**VARIANTS[name])
        stats = router(x_ND, facts_of(4, 16, 5), Memo())
        assert stats.gates_NK.shape == stats.chosen_NK.shape == stats.selected_NK.shape
        with pytest.raises(DataDependentOutputException):
            stats.counts_E.sum().item()


def test_without_row_keys_draws_depend_on_ids_and_places():
    for name in ("random", "jitter", "uniform", "hash"):
        router, x_ND = build(**VARIANTS[name])
        facts = facts_of()
        keyless = TokenFacts(facts.ids_BT, facts.places_BT)
        assert torch.equal(router(x_ND, keyless).selected_NK, router(x_ND, keyless).selected_NK)


@pytest.mark.parametrize("output", ["zero", "copy"])
@pytest.mark.parametrize("normalize", [True, False])
def test_null_experts_take_part_in_the_choice_and_compute_nothing(output, normalize):
    nulls = Extras(null_experts=NullSettings(count=3, output=output))
    router, x_ND = build(extras=nulls, normalize=normalize)
    as_real, _ = build(num_experts=11, normalize=normalize)
    stats, expected = router(x_ND), as_real(x_ND)
    assert stats.num_experts == 8 and stats.logits_NE.shape[1] == 11
    assert torch.equal(stats.selected_NK, expected.selected_NK)
    is_null_NK = expected.chosen_NK >= 8
    assert 0 < is_null_NK.sum() < is_null_NK.numel()
    assert torch.equal(stats.chosen_NK, expected.chosen_NK.where(~is_null_NK, 8))
    torch.testing.assert_close(stats.gates_NK, expected.gates_NK.where(~is_null_NK, 0.0))
    assert stats.selected_E.sum() == 128 and stats.counts_E.sum() == 128 - is_null_NK.sum()
    if output == "zero":
        assert stats.copy_N is None
    else:
        torch.testing.assert_close(stats.copy_N, expected.gates_NK.where(is_null_NK, 0.0).sum(1))


def test_capacity_drops_in_training_alone_and_leaves_the_wish_untouched():
    router, x_ND = build(extras=Extras(capacity=CapacitySettings(factor=0.5)))
    (plain, _), facts = build(), facts_of()
    stats, wished = router(x_ND, facts), plain(x_ND, facts)
    assert torch.equal(stats.selected_NK, wished.chosen_NK)
    assert (stats.counts_E < wished.counts_E).any()
    kept_NK = stats.chosen_NK < 8
    assert torch.equal(stats.gates_NK[kept_NK], wished.gates_NK[kept_NK]), "gates are not shared out anew"
    assert torch.equal(router.eval()(x_ND, facts).chosen_NK, wished.chosen_NK)
    assert torch.equal(router(x_ND).gates_NK, wished.gates_NK)


def test_routing_is_fp32_under_autocast():
    router, x_ND = build()
    plain = router(x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x_ND)
    assert torch.equal(plain.logits_NE, cast.logits_NE)
    assert cast.gates_NK.dtype == torch.float32
    assert router.to(torch.bfloat16)(x_ND.bfloat16()).gates_NK.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    router, x_ND = build(kind)
    stats = router(x_ND[:0], facts_of(0, 16))
    assert len(stats.chosen_NK) == 0 and not stats.counts_E.any()


def test_counts():
    chosen_NK = torch.tensor([[0, 3], [3, 1], [3, 0]])
    assert count_rows(chosen_NK, 5).tolist() == [2, 1, 0, 3, 0]
    assert count_rows(chosen_NK[:0], 5).tolist() == [0] * 5


def test_evaluation_is_refused_by_the_settings_exactly_where_the_router_refuses_it():
    for kind, changes in [*((kind, {}) for kind in KINDS), ("expert_choice", {"at_eval": "token_choice"})]:
        router, x_ND = build(kind, **changes)
        reason = evaluation_refusal(settings_of(kind, **changes))
        if reason is None:
            router.eval()(x_ND, facts_of())
        else:
            assert "at_eval" in reason
            with pytest.raises(ValueError, match="at_eval"):
                router.eval()(x_ND, facts_of())
