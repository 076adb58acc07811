"""The same bits at every run, and by name what cannot be had with it."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from attention.backends import flash_libraries
from attention.core import AUTO, BACKENDS
from run.deterministic import WITHOUT_ORDER, fix_order, forbidden
from run.start import refusing
from settings import Refusal
from tests.run.poison import TINY, die_at, tiny

ROOT = Path(__file__).parents[2]
QUIET = ("deterministic=true", "evals.every_tokens=6144")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def left_behind(name: str) -> dict[str, Any]:
    """Losses and norms as they were written, all scores, and the digests of the last checkpoint's tensors."""
    folder = Path("runs") / name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = sorted((folder / "checkpoints/step_00000012").rglob("*.safetensors"))
    return {
        "numbers": [(row["step"], row["loss"], row["gradient_norm"], row["max_violation"]) for row in rows],
        "scores": [json.loads(line)["score"] for line in (folder / "evals.jsonl").read_text().splitlines()],
        "digests": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }


def test_two_runs_are_the_same_bit_for_bit_also_when_one_was_killed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main(tiny("name=one", *QUIET))
    assert torch.are_deterministic_algorithms_enabled()
    with monkeypatch.context() as broken:
        die_at(broken, 8)
        with pytest.raises(KeyboardInterrupt):
            train.main(tiny("name=two", *QUIET))
    train.main(tiny("name=two", *QUIET))
    one, two = left_behind("one"), left_behind("two")
    assert len(one["numbers"]) == 12 and len(one["digests"]) >= 2
    assert one == two


@pytest.mark.distributed
def test_two_runs_of_two_ranks_are_the_same_bit_for_bit(here: Path) -> None:
    for name in ("one", "two"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = [str(TINY), f"name={name}", "parallel.expert=2", *QUIET]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert left_behind("one") == left_behind("two")


def test_it_is_off_where_nobody_asks_for_it(here: Path) -> None:
    torch.use_deterministic_algorithms(True)
    fix_order(False)
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_cublas_is_told_and_another_word_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_order(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(Refusal, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 .*unset it"):
        fix_order(True)
    fix_order(False)  # whoever does not ask for it may say what they like


def test_an_operator_that_forbids_it_is_named_with_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    fix_order(True)
    status = refusing(lambda: torch.zeros(4).put_(torch.tensor([1]), torch.ones(1)))  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert "put_ has no implementation" in said and "model.attention.backend" in said


def test_any_other_error_stays_what_it_is() -> None:
    assert forbidden(RuntimeError("out of memory")) is None

    def fail() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        refusing(fail)


@pytest.mark.parametrize("backend", ["cudnn", "xformers"])
def test_a_backend_without_a_fixed_order_is_refused_by_name(backend: str) -> None:
    with pytest.raises(Refusal, match=f'deterministic=true: model.attention.backend="{backend}".*use "auto"'):
        tiny("deterministic=true", f"model.attention.backend={backend}")
    tiny(f"model.attention.backend={backend}")


@pytest.mark.parametrize("experts", WITHOUT_ORDER)
def test_experts_without_a_known_order_are_refused_by_name(experts: str) -> None:
    with pytest.raises(Refusal, match=f'deterministic=true: model.moe.experts="{experts}".*use "auto"'):
        tiny("deterministic=true", f"model.moe.experts={experts}")
    tiny("deterministic=true", "model.moe.experts=triton")


def test_auto_never_takes_a_backend_without_a_fixed_order() -> None:
    assert all(BACKENDS[name].capability.deterministic for names in AUTO.values() for name in names)


def test_flash_attention_is_told_or_refused() -> None:
    def knows(deterministic: bool = False) -> None: ...
    def knows_not(causal: bool = False) -> None: ...

    assert flash_libraries._fixed_order(knows) == flash_libraries._fixed_order(knows_not) == {}
    fix_order(True)
    assert flash_libraries._fixed_order(knows) == {"deterministic": True}
    with pytest.raises(Refusal, match=r"deterministic=true.*sdpa"):
        flash_libraries._fixed_order(knows_not)


@pytest.mark.gpu
def test_on_one_gpu_two_runs_are_the_same_bit_for_bit(here: Path) -> None:
    for name in ("one", "two"):
        train.main(tiny(f"name={name}", "device=cuda", *QUIET))
    assert left_behind("one") == left_behind("two")
