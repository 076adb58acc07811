"""Training of many runs: what waits for what, what a failure leaves, and that nothing is trained twice."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from comparison import launch
from comparison.arms import Entry, expand, read_arms
from comparison.launch import train_all
from run.folder import hold, let_go
from settings import Refusal
from tests.comparison.test_arms import ARMS, BASE

TRAINER = """
import json, pathlib, sys, time, tomllib
config = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())
folder, branch = pathlib.Path("runs") / config["name"], config.get("branch")
with open("events", "a") as events:
    print("begin", config["name"], *sys.argv[2:], file=events)
if branch:
    assert list(pathlib.Path(branch["run"]).glob("checkpoints/*/manifest.json")), "branched too early"
time.sleep(0.2)
while pathlib.Path("slow_" + config["name"]).exists() and not pathlib.Path("go").exists():
    time.sleep(0.01)
if pathlib.Path("go").exists():
    time.sleep(0.5)  # long enough for whoever watches to have seen what came before
if pathlib.Path("fail_" + config["name"]).exists():
    print("first line")
    print("it went wrong")
    sys.exit(2)
steps = config["total_tokens"] // config["tokens_per_step"]
checkpoint = folder / "checkpoints" / f"step_{steps:08d}"
checkpoint.mkdir(parents=True)
(checkpoint / "manifest.json").write_text("{}")
with open("events", "a") as events:
    print("end", config["name"], file=events)
"""


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """Two bases, two arms each; in train.py's place something that takes a fifth of a second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(BASE)
    (tmp_path / "b.toml").write_text(BASE)
    (tmp_path / "arms.toml").write_text(ARMS)
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(launch, "TRAIN", tmp_path / "trainer.py")
    monkeypatch.setattr(launch, "PAUSE", 0.01)
    path = tmp_path / "arms.toml"
    return expand(read_arms(path, ["seeds=[0]"]), path, "t")


def events(kind: str) -> list[str]:
    path = Path("events")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.removeprefix(f"{kind} ") for line in lines if line.startswith(kind)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_all_are_trained_once_bases_before_their_arms(entries: list[Entry], jobs: int) -> None:
    said: list[str] = []
    train_all(entries, Path("runs/t"), jobs, said.append)
    names = [entry.config.name for entry in entries]
    assert sorted(events("end")) == sorted(names) and all(entry.is_finished for entry in entries)
    assert [line.split("] ")[0] for line in said] == [f"[{number}/6" for number in range(1, 7)]
    assert all(f"threads={max(1, (launch.os.cpu_count() or 1) // jobs)}" in line for line in events("begin"))
    train_all(entries, Path("runs/t"), jobs, said.append)
    assert len(events("begin")) == 6 and len(said) == 6


def test_so_many_at_a_time(entries: list[Entry]) -> None:
    begin = time.monotonic()
    train_all(entries, Path("runs/t"), 1, lambda line: None)
    assert time.monotonic() - begin > 6 * 0.2
    order = Path("events").read_text().splitlines()
    assert [line.split()[0] for line in order] == ["begin", "end"] * 6


def test_threads_that_the_configuration_names_are_left_alone(entries: list[Entry]) -> None:
    named = [Entry(e.config.model_copy(update={"threads": 1}), e.base, e.seed, e.arm) for e in entries[:1]]
    train_all(named, Path("runs/t"), 1, lambda line: None)
    assert events("begin") == ["t.a.0"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_others_go_on_after_a_failure_and_the_same_call_goes_on_with_it(entries: list[Entry], jobs: int) -> None:
    Path("fail_t.a.0.none").touch()
    said: list[str] = []
    (line,) = train_all(entries, Path("runs/t"), jobs, said.append)
    assert line.startswith("t.a.0.none: did not finish; runs/t/t.a.0.none.log ends with\n") and "it went wrong" in line
    assert {entry.config.name for entry in entries if not entry.is_finished} == {"t.a.0.none"} and len(said) == 6
    assert sum("t.a.0.none: failed" in line for line in said) == 1
    Path("fail_t.a.0.none").unlink()
    assert train_all(entries, Path("runs/t"), jobs, said.append) == []
    assert len(events("begin")) == 7 and len(events("end")) == 6


def test_what_branches_from_a_run_that_failed_is_not_begun(entries: list[Entry]) -> None:
    Path("fail_t.a.0").touch()
    lines = train_all(entries, Path("runs/t"), 2, lambda line: None)
    assert "t.a.0: did not finish" in lines[0]
    assert lines[1:] == [f"t.a.0.{arm}: waits for the run that it branches from" for arm in ("none", "yarn")]
    assert sorted(events("end")) == ["t.b.0", "t.b.0.none", "t.b.0.yarn"]
    assert {line.split()[0] for line in events("begin")} == {"t.a.0", *events("end")}


def test_an_interrupt_waits_for_what_trains(entries: list[Entry]) -> None:
    Path("slow_t.b.0").touch()

    def interrupt(line: str) -> None:
        Path("go").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all(entries, Path("runs/t"), 2, interrupt)
    assert events("end") == ["t.a.0", "t.b.0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_it_alone_reaches_what_trains_once(entries: list[Entry], tmp_path: Path, number: int) -> None:
    stopped = """
def stop(number, frame):
    with open("events", "a") as events:
        print("told", config["name"], file=events)
    time.sleep(0.3)  # a step, and a save
    sys.exit(0)
import signal
signal.signal(signal.SIGTERM, stop)
with open("events", "a") as events:
    print("ready", config["name"], file=events)
time.sleep(60)
"""
    begin = TRAINER[: TRAINER.index("folder, branch")]
    (tmp_path / "trainer.py").write_text(begin + stopped)

    def send() -> None:
        while len(events("ready")) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train_all(entries, Path("runs/t"), 2, said.append)
    assert sorted(line.split("] ")[1].split(" in ")[0] for line in said) == ["t.a.0: stopped", "t.b.0: stopped"]
    assert sorted(events("told")) == ["t.a.0", "t.b.0"], "each once, and none begun after"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "as it was before"


def test_a_run_that_was_stopped_counts_as_not_finished(entries: list[Entry], tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("print('stopped after step 3')")
    lines = train_all(entries, Path("runs/t"), 1, lambda line: None)
    assert [line.split(":")[0] for line in lines if "stopped after step 3" in line] == ["t.a.0", "t.b.0"]


@pytest.mark.parametrize(
    ("status", "is_finished", "asked", "told"),
    [
        (-signal.SIGTERM, False, True, "stopped"),
        (-signal.SIGTERM, False, False, "failed"),
        (2, False, True, "failed"),
        (0, False, False, "failed"),
        (-signal.SIGTERM, True, True, "trained"),
        (0, True, False, "trained"),
        (1, True, True, "trained, ended with status 1 (log)"),
    ],
)
def test_what_was_told_to_end_has_not_failed(
    entries: list[Entry], status: int, is_finished: bool, asked: bool, told: str
) -> None:
    if is_finished:
        checkpoint = entries[0].folder / "checkpoints" / "step_00000002"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    process = launch.subprocess.Popen(["true"])
    process.wait()
    process.returncode = status
    assert launch.Started(entries[0], process, Path("log"), 0.0, None).how(asked) == told


def test_a_log_is_gone_on_with_and_the_last_start_alone_is_told(entries: list[Entry], tmp_path: Path) -> None:
    """NUL bytes are what is left where a log was cut off under a process that writes on."""
    log = Path("runs/t/t.a.0.log")
    log.parent.mkdir(parents=True)
    log.write_text("before\n")
    (tmp_path / "trainer.py").write_text("import os\nos.write(1, bytes(9) + b'it went wrong')\nraise SystemExit(1)")
    (line,) = train_all(entries[:1], Path("runs/t"), 1, lambda line: None)
    assert line == f"t.a.0: did not finish; {log} ends with\n  it went wrong"
    assert log.read_bytes() == b"before\n" + bytes(9) + b"it went wrong"
    (tmp_path / "trainer.py").write_text("raise SystemExit(1)")
    (line,) = train_all(entries[:1], Path("runs/t"), 1, lambda line: None)
    assert line.endswith("nothing: it printed no word")


def test_what_another_process_trains_is_refused(entries: list[Entry]) -> None:
    """Its lock is that of train.py; nothing is begun, and nothing written over."""
    hold(entries[0].folder)
    with pytest.raises(Refusal, match=r"^t.a.0: trained by another process now.*train.py runs/t/t.a.0.toml.*again$"):
        train_all(entries, Path("runs/t"), 1, lambda line: None)
    assert not events("begin") and not Path("runs/t").exists()
    let_go(entries[0].folder)
    assert train_all(entries[:1], Path("runs/t"), 1, lambda line: None) == []


def test_a_run_at_a_time_on_each_device(entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees its own GPU alone, by its number among those that are seen here, and takes the one that is free."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    trainer = TRAINER.replace('    print("begin"', '    print("begin", os.environ["CUDA_VISIBLE_DEVICES"]')
    (tmp_path / "trainer.py").write_text(f"import os\n{trainer}")
    assert train_all(entries, Path("runs/t"), ["cuda:0", "cuda:1", "cpu"], lambda line: None) == []
    began = events("begin")
    assert {line.split()[0] for line in began} == {"4", "7", "4,7"}
    assert all(line.endswith(f"device={'cpu' if line.startswith('4,7') else 'cuda'}") for line in began)
    on_cuda_0 = [line.split()[1] for line in began if line.startswith("4 ")]
    assert 1 <= len(on_cuda_0) < 6 and len(began) == 6
    assert (
        launch.around("cuda:2") == {**launch.os.environ, "CUDA_VISIBLE_DEVICES": "-1"} and launch.around(None) is None
    )


def test_devices_that_are_not_there_are_refused(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    launch.check_places(["cuda:0", "cpu", None])
    with pytest.raises(Refusal, match=r"devices: 'cuda:1': torch finds 1 GPU, cuda:0 and up here"):
        launch.check_places(["cuda:0", "cuda:1"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["devices=['gpu0']"], "devices: 'gpu0' is none; write cuda:0"),
        (["devices=['cuda:0', 'cuda:0']"], "names one twice"),
        (["devices=['cuda:0']", "jobs=2"], "jobs=2 and devices both say"),
    ],
)
def test_devices_that_cannot_be(entries: list[Entry], tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        read_arms(tmp_path / "arms.toml", overrides)
