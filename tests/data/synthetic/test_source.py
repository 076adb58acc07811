"""Random-token tasks as training rows: whole samples, targets where the task asks alone, pure in (key, n)."""

from typing import Any

import numpy as np
import pytest
import torch

from data.batches import Batch, Batches, DataSettings
from data.demand import Demand
from data.rows import NO_TARGET
from settings import Refusal, validate

INDUCTION = {"kind": "induction"}
MQAR = {"kind": "mqar", "pairs": 3, "vocabulary": 16}
COPYING = {"kind": "copying"}


def batches_of(*sources: dict[str, Any], size: int = 16) -> Batches:
    table = {
        "tokenizer": {"kind": "integers", "size": size},
        "sources": {f"task{number}": {"kind": "synthetic", **source} for number, source in enumerate(sources)},
    }
    return Batches(validate(table, DataSettings, "test"), seed=5)


def take(batches: Batches, length: int = 64, count: int = 8, **more: Any) -> Batch:
    return batches.take(Demand(0, length, **more), 0, count, count)[0]


@pytest.mark.parametrize("task", [INDUCTION, MQAR, COPYING], ids=lambda task: task["kind"])
@pytest.mark.parametrize("length", [None, 16])
def test_rows_are_whole_samples(task: dict[str, Any], length: int | None) -> None:
    """Each sample is a document that stands alone, and asks what the same sample asks anywhere."""
    batches = batches_of({"task": task, **({"length": length} if length else {})})
    taken, size = take(batches), length or 64
    assert taken.lengths == (size,) * (8 * 64 // size) and taken.num_real == taken.num_tokens
    tokens_ST, labels_ST = taken.tokens_BT.view(-1, size), taken.labels_BT.view(-1, size)
    assert len(tokens_ST.unique(dim=0)) == len(tokens_ST)
    assert tokens_ST.min() >= 0 and tokens_ST.max() < 16
    asked = {"induction": 1, "mqar": 3, "copying": size // 2 - 1}[task["kind"]]
    assert ((labels_ST != NO_TARGET).sum(dim=1) == asked).all()
    assert torch.equal(taken.weights_BT, (taken.labels_BT != NO_TARGET).float())
    if task is INDUCTION:
        first_S = tokens_ST.argmin(dim=1)
        assert torch.equal(labels_ST[:, -1], tokens_ST[torch.arange(len(tokens_ST)), first_S + 1])
    assert batches.mean_document_lengths(Demand(0, 64)) == {"task0": float(size)}


def test_no_document_mask_adds_no_targets() -> None:
    batches = batches_of({"task": MQAR, "length": 16})
    assert torch.equal(take(batches, has_document_mask=False).labels_BT, take(batches).labels_BT)


def test_rows_are_pure_and_their_settings_are_their_fingerprint() -> None:
    one, two = batches_of({"task": MQAR}), batches_of({"task": {**MQAR, "pairs": 4}})
    assert one.fingerprint == batches_of({"task": MQAR, "weight": 3.0}).fingerprint
    assert one.fingerprint["sources.task0"] != two.fingerprint["sources.task0"]
    whole = one.take(Demand(0, 64), 0, 40, 40)[0]
    part = one.take(Demand(0, 64), 30, 10, 10)[0]
    assert torch.equal(part.tokens_BT, whole.tokens_BT[30:])
    assert not torch.equal(one.take(Demand(1, 64), 0, 40, 40)[0].tokens_BT, whole.tokens_BT)


def test_several_tasks_share_the_rows_as_weights_say() -> None:
    """Zoology's mix, in small: samples of several lengths in rows of the longest."""
    batches = batches_of({"task": {**MQAR, "pairs": 1}, "length": 16, "weight": 3.0}, {"task": MQAR})
    taken = take(batches, count=40)
    assert np.bincount(taken.sources_B.numpy()).tolist() == [30, 10]
    assert taken.num_targets == 30 * 4 * 1 + 10 * 3


@pytest.mark.parametrize(
    ("source", "length", "match"),
    [
        (
            {"task": INDUCTION, "length": 24},
            64,
            r"task0\.length=24 must divide sequence_length=64; try sequence_length=72",
        ),
        ({"task": INDUCTION}, 2, r"data\.sources\.task0: induction needs 3 tokens"),
        ({"task": {**MQAR, "pairs": 5}}, 16, r"data\.sources\.task0: mqar: pairs=5 need 20 tokens"),
        ({"task": {**MQAR, "pairs": 8}}, 64, r"data\.sources\.task0: mqar: pairs=8 need a vocabulary of 18"),
        ({"task": COPYING}, 63, r"data\.sources\.task0: .* even number of tokens; length=63, try 64"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(source: dict[str, Any], length: int, match: str) -> None:
    with pytest.raises(Refusal, match=match):
        batches_of(source).check(Demand(0, length))


def test_a_vocabulary_that_the_tokenizer_does_not_have_is_refused() -> None:
    match = r"task0\.task\.vocabulary=17 is more than the 16 ids below .* kind = \"integers\", size = 17"
    with pytest.raises(Refusal, match=match):
        batches_of({"task": {**INDUCTION, "vocabulary": 17}})
    with pytest.raises(Refusal, match="'task0' is not a source with held-out text"):
        batches_of({"task": INDUCTION}).held_out("task0")


def test_needles_need_a_source_of_text() -> None:
    needles = {"kind": "recall", "haystack": "task0"}
    table = {"sources": {"task0": {"kind": "synthetic", "task": INDUCTION}, "needles": needles}}
    with pytest.raises(Refusal, match=r"haystack='task0' must name a source of text"):
        validate(table, DataSettings, "test")
