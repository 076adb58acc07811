"""A share of the training in place of an interval: settled when a run begins, and what its loop then goes by."""

from types import SimpleNamespace

import pytest

from data.tokenizer import ByteTokenizer
from evals.cost import suite_flops
from model.size import flops_per_token
from parallel.world import World
from run.config import load_config
from run.exam import Examiner, settle_interval

QUICKSTART = "configs/quickstart.toml"
MATERIALS = SimpleNamespace(tokenizer=ByteTokenizer(), held_out={"python": ()})


@pytest.fixture
def config(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    table = load_config(QUICKSTART, [])
    evals = table.evals.model_copy(update={"every_tokens": None, "share": 0.05})
    return table.model_copy(update={"evals": evals})


def test_the_interval_is_what_the_share_pays_for(config):
    evals = settle_interval(SimpleNamespace(config=config), MATERIALS)
    once = suite_flops(config.evals, 1, config.model, 257)
    assert once / (evals.every_tokens * flops_per_token(config.model, 257, 128)) == pytest.approx(0.05, rel=1e-4)
    assert evals.share is None and evals.needle == config.evals.needle


def test_the_loop_goes_by_it(config):
    run = SimpleNamespace(config=config, world=World())
    examiner = Examiner(run, None, MATERIALS, None, {})
    assert examiner._evals == settle_interval(run, MATERIALS) and examiner._evals.every_tokens is not None
