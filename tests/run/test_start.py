"""A run's folder belongs to one run and one process, and whatever stands in the way is one message."""

import errno
import fcntl
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from model.size import Size
from run import files
from run import folder as room
from run.config import RunConfig, load_config
from run.folder import describe, hold, let_go
from run.start import Run, refusing, start, store_of_start
from settings import Refusal

TINY = Path(__file__).parents[1] / "tiny.toml"
SIZE = Size(*[1] * 7)
DATA = {"sources.words": "0123"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for path in list(room._held):
        let_go(path.parent)


def tiny(*overrides: str) -> RunConfig:
    return load_config(TINY, list(overrides))


def opened(*overrides: str, fresh: bool = False, tokens: int = 512) -> Run:
    """A run that has opened its folder and, with `tokens`, logged one row."""
    run = start(tiny(*overrides), fresh=fresh)
    run.open_folder(DATA, SIZE)
    if tokens:
        (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": tokens}) + "\n")
    run.finish()
    return run


def test_the_folder_that_fresh_chose_is_the_runs_name_and_continues() -> None:
    opened()
    assert opened(fresh=True).config.name == "tiny-2"
    assert load_config("runs/tiny-2/config.toml", []).name == "tiny-2"
    assert opened("name=tiny-2").folder == Path("runs/tiny-2")


def test_a_renamed_folder_continues() -> None:
    opened().folder.rename("runs/renamed")
    assert load_config(opened("name=renamed").folder / "config.toml", []).name == "renamed"


def test_what_may_change_and_what_may_not() -> None:
    opened()
    opened("log.every_steps=7", "threads=1", "checkpoint.keep=9", "profile={start_step = 1}")
    with pytest.raises(Refusal, match="seed: 0 -> 1"):
        start(tiny("seed=1"))


def test_a_folder_held_by_another_process_is_refused() -> None:
    run = start(tiny())
    run.folder.mkdir(parents=True)
    with (run.folder / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Refusal, match=r"runs/tiny: another process is training.*--fresh"):
            run.open_folder(DATA, SIZE)
    assert [path.name for path in run.folder.iterdir()] == [".lock"]
    run.open_folder(DATA, SIZE)
    with (run.folder / ".lock").open("a") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    hold(run.folder)  # a process never locks itself out
    run.finish()
    with (run.folder / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_taken_while_the_data_was_prepared_is_refused() -> None:
    slow = start(tiny("seed=1"))
    opened()
    with pytest.raises(Refusal, match="another configuration"):
        slow.open_folder(DATA, SIZE)
    assert load_config("runs/tiny/config.toml", []).seed == 0


def test_a_folder_in_which_nothing_was_trained_is_free() -> None:
    opened(tokens=0)
    run = start(tiny("seed=1"))
    run.open_folder({"sources.words": "other"}, SIZE)
    assert load_config(run.folder / "config.toml", []).seed == 1
    assert json.loads((run.folder / "materials.json").read_text()) == {"sources.words": "other"}
    (run.folder / "checkpoints/step_00000001").mkdir(parents=True)
    with pytest.raises(Refusal, match="another configuration"):
        start(tiny("seed=2"))


def test_a_folder_that_is_no_run_is_refused() -> None:
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/thesis.txt").write_text("two years")
    with pytest.raises(Refusal, match="it is no run"):
        start(tiny())


def test_the_environment_of_the_first_start_stays_and_what_is_new_is_added() -> None:
    folder, config = opened(tokens=0).folder, tiny()
    around = folder / "environment.json"
    describe(folder, config, DATA, {"commit": "a", "ranks": 1})
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 512}\n')
    for commit in ("a", "b", "b", "a"):
        describe(folder, config, DATA, {"commit": commit, "ranks": 1})
    expected = {"commit": "a", "ranks": 1, "restarts": [{"commit": "b"}, {"commit": "a"}]}
    assert json.loads(around.read_text()) == expected
    (folder / "metrics.jsonl").write_text('{"step": 12, "tokens": 6144}\n')
    describe(folder, config, DATA, {"commit": "c", "ranks": 1})
    assert json.loads(around.read_text()) == expected, "a finished run does not continue"


def test_files_are_replaced_whole_and_only_when_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened().folder
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix in (".toml", ".json")}
    opened()
    assert {path: path.stat().st_mtime_ns for path in before} == before

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        opened("log.every_steps=5")
    assert load_config(folder / "config.toml", []) == tiny(), "the old file stays whole until the new one is"


@pytest.mark.parametrize("name", ["config.toml", "materials.json", "environment.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b"\0\0\0", b"\xff"])
def test_a_damaged_file_of_the_folder_is_refused_by_name(name: str, content: bytes) -> None:
    path = opened().folder / name
    path.write_bytes(content)
    with pytest.raises(Refusal, match=rf"{name}.*\n?.*damaged.*good copy.*--fresh"):
        opened()
    assert path.read_bytes() == content


def test_signals_stop_a_run_only_once_its_folder_is_open() -> None:
    before = signal.getsignal(signal.SIGINT)
    run = start(tiny())
    assert signal.getsignal(signal.SIGINT) is before and not run.stop_requested
    run.open_folder(DATA, SIZE)
    signal.raise_signal(signal.SIGINT)
    assert run.stop_requested


def raising(error: BaseException) -> Callable[[], None]:
    def entry() -> None:
        raise error

    return entry


def test_a_file_system_that_refuses_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").write_text("a file")
    assert refusing(lambda: start(tiny()).open_folder(DATA, SIZE)) == 2
    said = capsys.readouterr().err
    assert said.startswith("refused: runs") and said.count("\n") == 1
    assert refusing(raising(PermissionError(errno.EACCES, "Permission denied", "runs/x"))) == 2
    assert "refused: runs/x: Permission denied; " in capsys.readouterr().err
    assert refusing(raising(OSError(errno.ENOSPC, "No space left on device"))) == 2
    with pytest.raises(ConnectionError):
        refusing(raising(ConnectionResetError(errno.ECONNRESET, "reset")))


def test_an_interruption_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusing(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_every_rank_that_refuses_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert refusing(raising(Refusal("no"))) == 2
    assert capsys.readouterr().err == "rank 3: refused: no\n"


def test_a_start_that_comes_after_another_does_not_read_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, is_master=True)
    keys = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for key, value in keys.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert store_of_start(None) is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    stores = []
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        stores.append(store_of_start(None))
    first, second = stores
    assert first is not None and second is not None
    first.set("address", "gone")
    assert first.check(["address"]) and not second.check(["address"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # several agents, whose counts may differ
    assert store_of_start(None) is None
