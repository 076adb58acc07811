"""Ranks that share out the rows: each row is read once, on one rank, and everybody gets the scores of all.

The cases run on 1, 2 and 3 gloo ranks (tests/ranks.py).
"""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from context.rotary import DefaultRotary
from data.tokenizer import ByteSettings, build_tokenizer
from evals import held_out, needle
from evals.held_out import HeldOutSettings
from evals.needle import NeedleSettings
from evals.ranks import Ranks
from evals.scoring import Materials, Rows, score_rows
from model.initialize import initialize
from model.transformer import ModelSettings, build_model
from parallel.world import World
from settings import validate

GRID = NeedleSettings(lengths=(64, 96), haystack="web", samples=3, one_haystack=True, depths=(0.0, 0.5, 1.0))


class Numbers(World):
    """A rank whose sums are what all ranks would have put in."""

    def sum(self, tensor):
        self.__dict__.setdefault("sums", []).append(tensor.clone())
        return tensor


@given(
    groups=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    size=st.integers(1, 5),
    together=st.integers(1, 3),
)
def test_every_group_has_one_reader_and_readers_have_even_work(groups, size, together):
    groups_G = np.array(groups)
    shares = [Ranks(World(rank, size * together), together).mine(groups_G) for rank in range(size * together)]
    readers = shares[::together]
    assert sorted(np.concatenate(readers).tolist()) == list(range(len(groups)))
    for first in range(0, size * together, together):
        assert all((shares[first] == share).all() for share in shares[first : first + together])
    for reader in readers:
        assert not {*groups_G[reader]} & {*np.delete(groups_G, reader)}
    assert max(map(len, readers)) - min(map(len, readers)) <= np.bincount(groups_G).max()


def test_a_large_group_weighs_as_much_as_many_small_ones():
    groups_G = np.array([0, 0, 0, 0, 1, 2, 3, 4])
    assert [Ranks(World(rank, 2)).mine(groups_G).tolist() for rank in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_neighbours_that_read_the_same_count_once():
    for rank, counts in ((0, True), (1, False), (2, True), (3, False)):
        world = Numbers(rank, 4)
        found = Ranks(world, together=2).sum(np.array([3.0, 4.0]), torch.device("cpu"))
        assert found.tolist() == ([3.0, 4.0] if counts else [0.0, 0.0]) and len(world.sums) == 1


def materials(ranks: Ranks) -> Materials:
    rng = np.random.default_rng(0)
    text = rng.integers(97, 123, 3000)
    text[[400, 900, 1500]] = 256
    return Materials(
        build_tokenizer(ByteSettings()), {"web": text}, torch.device("cpu"), contextlib.nullcontext, 500, ranks
    )


def decoder():
    attention = {"num_heads": 2, "num_kv_heads": 1}
    table = {"num_layers": 2, "width": 16, "attention": attention, "feed_forward_width": 24}
    model = build_model(validate(table, ModelSettings, ""), 257)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=100.0))
    with torch.no_grad():
        model.head_weight.mul_(20)
    return model


def numbers(extra: dict) -> dict:
    """One by one: `approx` looks into no lists of lists, and takes no words."""
    told = {key: value for key, value in extra.items() if key not in ("pieces", "text")}
    return told | {f"pieces.{n}.{m}": x for n, pair in enumerate(extra.get("pieces", ())) for m, x in enumerate(pair)}


def close(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.task, one.length, one.depth, one.count) == (other.task, other.length, other.depth, other.count)
        assert one.score == pytest.approx(other.score, rel=1e-5)
        assert numbers(one.extra) == pytest.approx(numbers(other.extra), rel=1e-4)
        assert one.extra.get("text") == other.extra.get("text")


def case_scores_are_those_of_one_rank() -> None:
    world = World(dist.get_rank(), dist.get_world_size())
    model, shared, alone = decoder(), materials(Ranks(world)), materials(Ranks())
    tokens_read = []
    model.register_forward_pre_hook(lambda module, given: tokens_read.append(given[0].numel()))
    for module, settings in (needle, GRID), (held_out, HeldOutSettings(lengths=(32, 64), tokens=512)):
        tokens_read.clear()
        ours = module.run(model, settings, shared, 0)
        num_ours = sum(tokens_read)
        tokens_read.clear()
        close(ours, module.run(model, settings, alone, 0))
        # Rows in common are read together: no rank does what another has done.
        total = world.sum(torch.tensor(num_ours)).item()
        assert total == sum(tokens_read), f"{total} tokens on all ranks, {sum(tokens_read)} on one"
        assert num_ours <= 0.7 * total or world.size == 1


def case_one_row_is_enough_for_all() -> None:
    """Ranks without a row of their own still take part."""
    world = World(dist.get_rank(), dist.get_world_size())
    tokens = np.arange(40)[None] % 26 + 97
    rows = Rows(tokens, np.roll(tokens, -1))
    ours, alone = (score_rows(decoder(), materials(ranks), rows) for ranks in (Ranks(world), Ranks()))
    np.testing.assert_array_equal(ours[0], alone[0])
    np.testing.assert_allclose(ours[1], alone[1], rtol=1e-5)


def case_what_is_no_number_stays_none() -> None:
    world = World(dist.get_rank(), dist.get_world_size())
    model = decoder()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    tokens = np.random.default_rng(1).integers(97, 123, (5, 20))
    _, logprob_BT = score_rows(model, materials(Ranks(world)), Rows(tokens, np.roll(tokens, -1, axis=1)))
    assert np.isnan(logprob_BT).all()


@pytest.fixture(scope="module")
def outcomes(run_on_ranks):
    return run_on_ranks(__file__, 1, 2, 3)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("case", [name for name in dict(globals()) if name.startswith("case_")])
def test_over_ranks(outcomes, case, size):
    assert outcomes[size][case] == ""


def test_one_rank_asks_nobody():
    world = Numbers(0, 1)
    tokens = np.full((2, 9), 100)
    score_rows(decoder(), replace(materials(Ranks(world))), Rows(tokens, tokens))
    assert "sums" not in world.__dict__
