"""Which checkpoints stay, where a run died between writing one and removing another."""

from pathlib import Path

import pytest

from checkpoint.keeping import Keeping
from tests.checkpoint.test_checkpoint import build, open_in, saved_run


def test_what_the_last_save_left_too_many_is_removed_by_the_next_start(tmp_path: Path) -> None:
    paths = saved_run(tmp_path, steps=4, keep=4)
    checkpoints, _ = open_in(tmp_path, *build(), keep=3)  # as if killed after the fourth was renamed
    assert checkpoints.restore_latest() is not None
    assert [path.exists() for path in paths] == [False, True, True, True]


def test_nothing_is_read_where_there_are_no_more_than_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = saved_run(tmp_path, steps=3, keep=4)
    checkpoints, _ = open_in(tmp_path, *build(), keep=3)
    monkeypatch.setattr(Keeping, "prune", lambda *_: pytest.fail("all of them would be verified"))
    assert checkpoints.restore_latest() is not None
    assert all(path.exists() for path in paths)


def test_what_stays_for_good_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on beside fifty ends of stages may not have to read them all before its first save is done."""
    paths = saved_run(tmp_path, steps=6, keep=6)
    checkpoints, _ = open_in(tmp_path, *build(), keep=2)
    keeping = checkpoints.keeping
    keeping.keep_every = 1
    read: list[str] = []
    verify = keeping.verify
    monkeypatch.setattr(keeping, "verify", lambda folder: read.append(folder.name) or verify(folder))
    keeping.prune(paths[-1])
    assert read == ["step_00000005"] and all(path.exists() for path in paths)
