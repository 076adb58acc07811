"""How experts are chosen: against plain loops, and what must not matter to it."""

import pytest
import torch

from moe.choice import (
    Drawn,
    ExpertChoice,
    ExpertChoiceSettings,
    GroupSettings,
    HashSettings,
    InTurn,
    RandomSettings,
    UniformSettings,
    check_groups,
    within_best_groups,
)
from moe.routing import TokenFacts
from settings import Refusal


def facts_of(rows, length, is_real_BT=None):
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(40, (rows, length), generator=generator)
    keys_B = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    return TokenFacts(ids_BT, torch.arange(length).expand(rows, -1), keys_B, is_real_BT)


def log_scores(tokens, experts):
    torch.manual_seed(0)
    return torch.randn(tokens, experts).log_softmax(-1)


@pytest.mark.parametrize("score", ["top2", "max"])
@pytest.mark.parametrize(("count", "keep"), [(2, 1), (4, 2), (3, 3), (6, 4)])
def test_groups_leave_the_experts_of_the_best_ones(score, count, keep):
    torch.manual_seed(0)
    scores_NE = torch.randn(20, 12)  # below zero too, as a bias makes them
    limited_NE = within_best_groups(scores_NE, GroupSettings(count=count, keep=keep, score=score))
    size = 12 // count
    for ours, scores_E in zip(limited_NE.tolist(), scores_NE.tolist(), strict=True):
        groups = [scores_E[start : start + size] for start in range(0, 12, size)]
        worth = [sum(sorted(group)[-2:]) if score == "top2" else max(group) for group in groups]
        best = sorted(range(count), key=worth.__getitem__)[-keep:]
        assert ours == [value if e // size in best else float("-inf") for e, value in enumerate(scores_E)]


@pytest.mark.parametrize(
    ("groups", "num_experts", "experts_per_token", "expected"),
    [
        ({"count": 3, "keep": 2}, 8, 2, r"router\.groups\.count=3 must divide num_experts=8; try one of \[2, 4, 8\]"),
        ({"count": 4, "keep": 5}, 8, 2, r"router\.groups\.keep=5 must be at most router\.groups\.count=4"),
        ({"count": 4, "keep": 1}, 8, 3, r"router\.groups\.keep=1 .*experts_per_token=3; raise keep to 2"),
        ({"count": 8, "keep": 4}, 8, 2, r'router\.groups\.score="top2" needs groups of 2'),
    ],
)
def test_impossible_groups_are_refused(groups, num_experts, experts_per_token, expected):
    with pytest.raises(ValueError, match=expected):
        check_groups(GroupSettings(**groups), num_experts, experts_per_token)
    check_groups(GroupSettings(count=4, keep=2), 8, 4)
    check_groups(GroupSettings(count=8, keep=4, score="max"), 8, 4)


@pytest.mark.parametrize(
    ("rows", "length", "experts", "per_token"), [(3, 16, 4, 2), (2, 7, 5, 3), (1, 1, 3, 1), (2, 8, 2, 2)]
)
@pytest.mark.parametrize("padding", [0, 2])
def test_every_expert_takes_its_best_tokens_of_each_row(rows, length, experts, per_token, padding):
    if padding >= length:
        pytest.skip("nothing left")
    is_real_BT = torch.arange(length).expand(rows, -1) < length - padding if padding else None
    scores_NE = log_scores(rows * length, experts)
    chooser = ExpertChoice(ExpertChoiceSettings(), per_token, layer=0)
    table_NE = chooser.choose(scores_NE, None, facts_of(rows, length, is_real_BT), is_training=True)
    capacity = -(-length * per_token // experts)
    assert chooser.tokens_per_expert(length, experts) == capacity
    expected_NE = torch.full((rows * length, experts), experts)
    for row in range(rows):
        for expert in range(experts):
            scores = [(scores_NE[row * length + t, expert].item(), t) for t in range(length - padding)]
            for _, t in sorted(scores)[-capacity:]:
                expected_NE[row * length + t, expert] = expert
    assert torch.equal(table_NE, expected_NE)


def test_expert_choice_meets_k_experts_on_average_and_some_tokens_none():
    chooser = ExpertChoice(ExpertChoiceSettings(), 2, layer=0)
    table_NE = chooser.choose(log_scores(4 * 64, 8), None, facts_of(4, 64), is_training=True)
    per_token_N = (table_NE < 8).sum(1)
    assert per_token_N.sum() == 4 * 64 * 2 and (table_NE < 8).sum(0).tolist() == [64] * 8
    assert per_token_N.min() == 0 and per_token_N.max() > 2


def test_expert_choice_sees_the_future_and_at_eval_it_does_not():
    """The caveat: changing a later token changes what happens to an earlier one; in evaluation it must not."""
    scores_NE, facts = log_scores(16, 4), facts_of(1, 16)
    changed_NE = scores_NE.clone()
    changed_NE[8:] = 0.0
    chooser = ExpertChoice(ExpertChoiceSettings(at_eval="token_choice"), 2, layer=0)
    one, two = (chooser.choose(s, None, facts, is_training=True) for s in (scores_NE, changed_NE))
    assert not torch.equal(one[:8], two[:8])
    one, two = (chooser.choose(s, None, None, is_training=False) for s in (scores_NE, changed_NE))
    assert torch.equal(one[:8], two[:8])
    assert torch.equal(one, scores_NE.topk(2).indices)
    refusing = ExpertChoice(ExpertChoiceSettings(), 2, layer=0)
    with pytest.raises(Refusal, match=r'model\.moe\.router\.at_eval="token_choice"'):
        refusing.choose(scores_NE, None, facts, is_training=False)


def control(settings, per_token=2, layer=0):
    return {"random": Drawn, "hash": Drawn, "uniform": InTurn}[settings.kind](settings, per_token, layer)


CONTROLS = [RandomSettings(), HashSettings(), UniformSettings()]


@pytest.mark.parametrize("settings", CONTROLS, ids=lambda settings: settings.kind)
@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (5, 5), (7, 3), (1, 1)])
def test_controls_name_different_experts_and_ignore_the_scores(settings, experts, per_token):
    facts = facts_of(4, 32)
    chooser = control(settings, per_token)
    table_NK = chooser.choose(log_scores(128, experts), None, facts, is_training=True)
    assert table_NK.shape == (128, per_token) and table_NK.min() >= 0 and table_NK.max() < experts
    assert all(len(set(row)) == per_token for row in table_NK.tolist())
    for is_training in (True, False):
        assert torch.equal(chooser.choose(torch.zeros(128, experts), None, facts, is_training), table_NK)


def test_random_choice_is_even_over_pairs_and_new_in_every_layer():
    facts = facts_of(64, 64)
    tables = [control(RandomSettings(), layer=layer).choose(log_scores(4096, 6), None, facts, True) for layer in (0, 1)]
    pairs = torch.zeros(6, 6).index_put_(tuple(tables[0].T), torch.ones(4096), accumulate=True)
    off_diagonal = pairs[~torch.eye(6, dtype=torch.bool)]
    chi_squared = ((off_diagonal - 4096 / 30).square() / (4096 / 30)).sum()
    assert chi_squared < 58, "of 29 degrees of freedom; 58 is the 99.9th percentile"
    agreement = (tables[0][:, 0] == tables[1][:, 0]).float().mean().item()
    assert agreement == pytest.approx(1 / 6, abs=0.03)


def test_hash_choice_depends_on_the_id_alone():
    facts = facts_of(8, 32)
    ids_N = facts.ids_BT.flatten()
    table_NK = control(HashSettings()).choose(log_scores(256, 8), None, facts, True)
    for token_id in ids_N.unique():
        assert len(table_NK[ids_N == token_id].unique(dim=0)) == 1
    other_NK = control(HashSettings(), layer=1).choose(log_scores(256, 8), None, facts, True)
    assert not torch.equal(other_NK, table_NK)
    # Many ids spread over all experts.
    many = TokenFacts(torch.arange(8000)[None], torch.zeros(1, 8000, dtype=torch.int64))
    load_E = control(HashSettings()).choose(torch.zeros(8000, 8), None, many, True).flatten().bincount(minlength=8)
    assert (load_E - 2000).abs().max() < 200


@pytest.mark.parametrize(("experts", "per_token", "length"), [(8, 2, 32), (6, 4, 9), (7, 3, 20)])
def test_uniform_choice_is_as_even_as_can_be_in_every_row(experts, per_token, length):
    facts = facts_of(16, length)
    table_NK = control(UniformSettings(), per_token).choose(torch.zeros(16 * length, experts), None, facts, True)
    for row_TK in table_NK.view(16, length, per_token):
        load_E = row_TK.flatten().bincount(minlength=experts)
        assert load_E.max() - load_E.min() <= 1
    starts = table_NK.view(16, length, per_token)[:, 0, 0]
    assert len(starts.unique()) > 2, "rows begin at different experts"
