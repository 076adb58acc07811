"""configs/cluster/slurm.sh, with stand-ins for what a cluster has: what is started, asked to stop, and queued again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "configs" / "cluster" / "slurm.sh"
STAND_INS = {
    # srun runs what it is given here, and ends as it does.
    "srun": 'shift; echo "srun $*" >> calls; echo $BASHPID > pid; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> calls; [ "$1" != show ] || printf "node7\\nnode8\\n"',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM $(cat pid)',
    # torchrun ends with the status in `ends`, or is asked to stop, takes a moment to save, and ends with 1.
    "torchrun": '[ "$1" != --help ] || { echo "${HELP:-}"; exit; }; trap "sleep 0.2; touch saved; exit 1" TERM; '
    "touch begun; while [ ! -e ends ]; do sleep 0.01; done; exit $(cat ends)",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, in a job on two nodes."""
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for key, value in {"JOB_ID": "123456", "NNODES": "2", "GPUS_ON_NODE": "4", "JOB_NODELIST": "node[7-8]"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    return tmp_path


def submit(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", str(SCRIPT), *words], cwd=folder, stderr=subprocess.PIPE)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.01)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1])
def test_a_job_ends_as_its_run_does(cluster: Path, status: int) -> None:
    (cluster / "ends").write_text(str(status))
    job = submit(cluster, "some.toml", "seed=1")
    assert job.wait(60) == status
    shown, started = calls(cluster)
    assert shown == "scontrol show hostnames node[7-8]"
    assert started.endswith(" train.py some.toml seed=1") and "--shutdown-timeout" not in started
    for words in (
        "torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 ",
        "--rdzv-endpoint node7:23456 --rdzv-id 123456.0",
    ):
        assert words in started


def test_a_job_that_is_asked_to_stop_saves_before_it_is_queued_again(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELP", "--shutdown-timeout SECONDS")
    job = submit(cluster, "some.toml")
    wait_for(cluster / "begun")
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert (cluster / "saved").exists()
    assert calls(cluster)[-2:] == ["scancel --signal=TERM --quiet 123456.0", "scontrol requeue 123456"]
    assert "--shutdown-timeout 100" in calls(cluster)[1]


def test_a_job_without_a_configuration_says_how_it_is_used(cluster: Path) -> None:
    job = submit(cluster)
    assert job.wait(60) == 2 and job.stderr is not None
    assert b"usage: sbatch" in job.stderr.read()
    assert not (cluster / "calls").exists()
