"""Bits per byte: known for models that know nothing or all, and over the same text at every length."""

import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from evals import held_out
from evals.held_out import HeldOutSettings
from settings import Refusal


def test_knowing_nothing_costs_the_whole_alphabet(models, materials):
    settings = HeldOutSettings(lengths=(16, 64, 256), sources=("web",), tokens=4096)
    cells = held_out.run(models.CopyOracle(), settings, materials, seed=0)
    assert [(cell.task, cell.length, cell.depth) for cell in cells] == [
        ("held_out/web", n, None) for n in (16, 64, 256)
    ]
    for cell in cells:
        assert cell.score == pytest.approx(math.log2(257), abs=1e-4)
        assert cell.extra["loss"] == pytest.approx(math.log(257), abs=1e-4)


def test_every_length_reads_the_same_bytes(models, materials, haystack):
    settings = HeldOutSettings(lengths=(16, 64, 256), sources=("web",), tokens=4096)
    counts = {cell.extra["bytes"] for cell in held_out.run(models.RandomModel(), settings, materials, seed=0)}
    # A border between documents costs the end of text and the byte after it, whatever the length.
    assert len(counts) == 1 and 0.95 * 4096 < counts.pop() < 4096


def test_more_context_helps_who_uses_it(models, materials, haystack):
    settings = HeldOutSettings(lengths=(16, 64, 256), sources=("web",))
    scores = [cell.score for cell in held_out.run(models.Seer(haystack), settings, materials, seed=0)]
    # The first 7 of every window are unknown to this model, the rest is free.
    for length, score in zip((16, 64, 256), scores, strict=True):
        assert score == pytest.approx(math.log2(257) * 7 / length, rel=0.15)


def test_documents_do_not_see_each_other(models, materials):
    model = models.RandomModel()
    held_out.run(model, HeldOutSettings(lengths=(512,), sources=("web",)), materials, seed=0)
    split = [call for call in model.calls if call.mask.documents is not None]
    assert split, "the text has documents shorter than the window"
    for call in split:
        assert sum(call.mask.documents.lengths) == call.tokens_BT.numel()
        assert int((call.positions_BT == 0).sum()) == len(call.mask.documents.lengths)


def test_every_source_by_default(models, materials):
    cells = held_out.run(models.RandomModel(), HeldOutSettings(lengths=(32,)), materials, seed=0)
    assert [cell.task for cell in cells] == ["held_out/web", "held_out/small"]


def test_what_does_not_fit_is_refused(materials):
    with pytest.raises(Refusal, match=r"evals.held_out.lengths=50 .*'small' has 50 held-out tokens; lower it to 49"):
        held_out.check(HeldOutSettings(lengths=(16, 50)), materials)
    held_out.check(HeldOutSettings(lengths=(16, 49)), materials)
    with pytest.raises(Refusal, match="did you mean 'web'"):
        held_out.check(HeldOutSettings(lengths=(16,), sources=("webb",)), materials)
    with pytest.raises(Refusal, match="no source"):
        held_out.check(HeldOutSettings(lengths=(16,)), replace(materials, held_out={}))
    for lengths in ((), (0,), (16, 16)):
        with pytest.raises(ValidationError):
            HeldOutSettings(lengths=lengths)


def test_pieces_add_up_and_the_text_is_named(models, materials):
    settings = HeldOutSettings(lengths=(16, 64), sources=("web",), tokens=4096)
    short, long = held_out.run(models.RandomModel(), settings, materials, seed=0)
    (other, _) = held_out.run(models.CopyOracle(), settings, materials, seed=0)
    assert len(short.extra["pieces"]) == 32 and sum(size for _, size in short.extra["pieces"]) == short.extra["bytes"]
    nats = sum(nats for nats, _ in long.extra["pieces"])
    assert nats / math.log(2) / long.extra["bytes"] == pytest.approx(long.score, rel=1e-4)
    assert short.extra["text"] == other.extra["text"] != long.extra["text"]
    assert [size for _, size in short.extra["pieces"]] == [size for _, size in other.extra["pieces"]]
    settings = HeldOutSettings(lengths=(64,), sources=("web",), tokens=64)
    assert len(held_out.run(models.RandomModel(), settings, materials, seed=0)[0].extra["pieces"]) == 1
