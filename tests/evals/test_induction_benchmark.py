"""benchmarks/induction_heads.py: what it cannot do as asked it refuses, and a training that fails is its own end."""

import subprocess
from types import SimpleNamespace

import pytest

from benchmarks.induction_heads import main, parse_arguments
from settings import Refusal


def ask(*words: str) -> None:
    main(parse_arguments(words))


@pytest.mark.parametrize(("words", "why"), [
    (["--short", "--steps", "8"], "--short --steps 8: .* has its own number of steps"),
    (["name=mine"], "name=mine: .* give --name instead"),
    (["--steps", "8", "tokens_per_step=4096"], "tokens_per_step=4096: is the published 2048"),
    (["context.stages.0.tokens_per_step=4096"], "is the published 2048"),
])  # fmt: skip
def test_what_would_be_dropped_or_told_wrongly_is_refused(words, why, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(Refusal, match=why):
        ask(*words)


@pytest.mark.parametrize(("returned", "status"), [(2, 2), (-15, 143)])
def test_a_training_that_fails_ends_it_with_the_same_status(returned, status, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda words, **_: SimpleNamespace(returncode=returned))
    with pytest.raises(SystemExit) as end:
        ask("--steps", "8")
    assert end.value.code == status
