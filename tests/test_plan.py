"""What plan.py prints, and that it refuses what train.py would."""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import plan
from model.size import count, flops_per_token
from planning.given import fewest_ranks
from planning.outlook import table
from run.config import load_config
from run.metrics import short
from settings import Refusal

ROOT = Path(__file__).parents[1]
TINY = Path(__file__).parent / "tiny.toml"
TEXTS = "data.sources.words.path=words.jsonl"


HUGE = [
    (key, value, shown)
    for key in ("num_layers", "width", "norm_epsilon")
    for value, shown in (("inf", "Infinity"), ("nan", "NaN"), (f"{-(2**40)}", f"{-(2**40)}"))
] + [(key, 2**40, 2**40) for key in ("num_layers", "width")]


def write_documents() -> None:
    """Texts of a few words each, so that several share a row."""
    draws = random.Random(0)
    texts = ["".join(draws.choices("abcdefgh ", k=draws.randint(5, 60))) for _ in range(600)]
    Path("words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(autouse=True)
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_documents()


def printed(capsys: pytest.CaptureFixture[str], *overrides: str, **options: object) -> str:
    given = plan.parse_arguments([str(TINY), TEXTS, *overrides])
    plan.main(argparse.Namespace(**(vars(given) | {"rate": 1e9} | options)))
    return capsys.readouterr().out


def test_the_whole_plan_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys)
    size = count(load_config(TINY, []).model, 257)
    assert said.startswith(f"{short(size.total)} parameters, of which a token meets {short(size.active)}: embedding")
    title, first, second, whole = said.split("\n\n")[1].splitlines()
    assert title.startswith("stage  tokens  steps  length  rows a step  a micro-batch  ranks a row")
    assert title.split()[-5:] == ["FLOP", "in", "attention", "memory", "time"]
    assert first.split()[:7] == ["0", "4.1K", "8", "64", "8", "4", "1"]
    assert second.split()[:7] == ["1", "2.05K", "4", "128", "4", "2", "1"]
    assert whole.split()[:3] == ["all", "6.14K", "12"]
    parts = [line.split("  ")[0] for line in said.split("\n\n")[2].splitlines()]
    assert parts[:4] == ["memory of a rank", "weights", "gradients", "moments"] and "all" in parts
    assert "1 x CPU" in said and "documents as in each stage's first rows" in said
    assert "Time: 1B FLOP/s a rank, 100% of 1B (given, of a whole step)" in said
    assert "layers by" not in said and not Path("runs").exists()
    assert "MFU: the model's operations, forward and backward, causal, none done twice / seconds / peak" in said
    assert "Routing: top-2 of 4, learned (even load assumed" in said and "Padding: 0% of the tokens (rows are" in said


def test_operations_of_a_token_are_told_as_it_sees_and_as_if_it_saw_all(capsys: pytest.CaptureFixture[str]) -> None:
    model = load_config(TINY, []).model
    for line, length in zip(printed(capsys, no_data=True).split("\n\n")[1].splitlines()[1:3], (64, 128), strict=True):
        said = line.split()[7:9]
        assert said == [short(flops_per_token(model, 257, length, causal=causal)) for causal in (True, False)]
        assert said[0] != said[1]


def test_documents_cost_less_than_whole_rows(capsys: pytest.CaptureFixture[str]) -> None:
    def share(said: str) -> float:
        return float(said.split("\n\n")[1].splitlines()[1].split()[10].rstrip("%"))

    documents, rows = share(printed(capsys)), share(printed(capsys, no_data=True))
    assert 0 < documents < rows


def test_ranks_that_share_rows_and_what_they_send(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "context.stages.1.context=2", "parallel.expert=4", "tokens_per_microbatch=128")
    assert "4 x CPU" in said, "the fewest that divide into groups of 2 and of 4"
    assert "stage 1, full layers by groupcast" in said and "stage 0, full layers" not in said
    assert "exchange" in said
    assert "2 x CPU" in printed(capsys, ranks=2)


def test_the_mesh_in_one_line_and_a_step_part_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    mesh = ("parallel.shard=2", "parallel.expert=4", "parallel.tensor=2", "model.attention.num_kv_heads=2")
    said = printed(capsys, *mesh, "tokens_per_microbatch=128", ranks=8, ranks_per_node=4, device="h100", rate=None)
    lines = said.splitlines()
    assert lines[1] == "8 ranks = replicate 2 x shard 2 x tensor 2, on 2 nodes of 4; 4 neighbours share experts"
    parts = [line.split("  ")[0] for line in said.split("\n\n")[3].splitlines()]
    assert parts[0] == "a step of a rank" and {"attention", "experts", "shard", "tensor", "expert", "replicate"} <= set(
        parts
    )
    assert parts[-3:] == ["all", "tokens a second, of a rank", "MFU"]
    assert "hidden, sends" in said and "gathered" in said


def test_the_fewest_ranks_divide_into_all_groups() -> None:
    config = load_config(TINY, ["context.stages.1.context=3", "parallel.expert=2"])
    assert fewest_ranks(config) == 6
    cut = load_config(TINY, ["parallel={replicate=3,shard=2,tensor=2}", "model.attention.num_kv_heads=2"])
    assert fewest_ranks(cut) == 12 and fewest_ranks(load_config(TINY, [])) == 1


def test_another_device_and_what_does_not_fit_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, device="h100", rate=None)
    assert "1 x h100" in said and "part by part, of 989T FLOP/s a rank (as published)" in said and "of 79 GiB" in said
    assert "!" not in said
    assert "%!" in printed(capsys, "model.moe.expert_width=999936", "model.num_layers=150", device="h100", rate=None)
    assert "50% of 989T" in printed(capsys, device="h200", rate=None, efficiency=0.5)


@pytest.mark.parametrize(
    ("overrides", "options", "expected"),
    [
        (["optimizer.lerning_rate=1"], {}, "did you mean 'learning_rate'"),
        (["data.sources.words.path=nowhere.txt"], {}, r"(?s)nowhere.txt.*--no-data plans without"),
        (["model.moe.capacity={factor = 1.0}", "context.stages.0.context=2"], {}, "context.stages.0.context=2 gives"),
        (["tokens_per_microbatch=512"], {"ranks": 3}, "does not divide among 3 ranks"),
        (["context.stages.1.sequence_length=8"], {}, "(?i)needle"),
        (["context.stages.1.growth={kind = 'linear', start = 8}"], {}, "(?i)needle"),
        (["device=cuda"], {"ranks": 1}, "no NVIDIA GPU"),
        ([], {"device": "h300"}, "--device h300"),
        ([], {"ranks_per_node": 0}, "--ranks-per-node 0: .*1 or more"),
        ([], {"config": None}, "give a configuration, such as .* or a budget: --flops"),
        ([], {"search": "8-4"}, "--search 8-4: give a number of ranks"),
        ([], {"search": "x"}, "--search x: give a number of ranks"),
        ([], {"flops": 1e20, "hours": 1.0}, "--flops and --hours: give one"),
        ([], {"flops": 0.0}, "--flops 0: give a number above 0"),
        ([], {"flops": 1.0}, "1 FLOPs: no budget of a run; give --flops .* for 1e\\+09"),
        ([], {"flops": 1e300}, "1e\\+300 FLOPs: no budget of a run"),
        ([], {"flops": 1e15, "search": "4"}, "--flops or --hours and --search: each asks something else"),
        ([], {"longest": True, "search": "4"}, "--search and --longest: each asks something else"),
        ([], {"coefficients": "epoch"}, "--coefficients: belongs to a budget"),
        ([], {"search": "4", "ranks": 4}, "--ranks 4: --search says how many"),
        ([], {"search": "4096"}, "--search 4096: this configuration divides among no mesh of so many ranks"),
        (
            ["data.tokenizer={kind = 'bpe', file = 'no.json'}"],
            {"no_data": True},
            "no.json.*(?s:.)*to plan before it is made",
        ),
        ([], {"rate": 1e-300}, "--rate 1e-300: give floating-point"),
        ([], {"hours": float("nan")}, "--hours nan"),
        ([], {"flops": 1e15, "unique_tokens": -1.0}, "--unique-tokens -1"),
        ([], {"flops": 1e15, "coefficients": "kaplan"}, "no set of coefficients 'kaplan'; known: epoch"),
        ([], {"flops": 1e26}, "no model of this shape has about"),
        (["parallel.shard=2", "parallel.expert=4"], {"ranks": 6}, "--ranks 6: .*shard=2, .*expert=4; give 4"),
        ([], {"rate": 0.0}, "--rate 0"),
        ([], {"rate": float("nan")}, "--rate nan"),
        ([], {"rate": float("inf")}, "--rate inf"),
        ([], {"device": "tpu"}, "--device tpu"),
        *(([f"model.{key}={value}"], {}, rf"model.{key}={shown}: ") for key, value, shown in HUGE),
        *(([], {"ranks": ranks}, f"--ranks {ranks}: .* no groups; give 1 or") for ranks in (0, -2)),
        (["parallel.context=2"], {"ranks": 3}, "--ranks 3: .* has parallel.context=2; give 2 or a multiple of it"),
        (["parallel.expert=4", "context.stages.1.context=2"], {"ranks": 2}, r"--ranks 2: .*expert=4, .*=2; give 4"),
        *(
            ([], {"efficiency": share}, "--efficiency .*above 0 and up to 1")
            for share in (5.0, 0.0, -1.0, float("nan"))
        ),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    overrides: list[str], options: dict[str, object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if overrides == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(Refusal, match=expected):
        printed(capsys, *overrides, **options)


def test_without_data_none_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "data.sources.words.path=nowhere.txt", no_data=True)
    assert "as if every row were one document" in said


def test_the_command_line() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "plan.py"), str(TINY), TEXTS, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    said = run("--rate", "1e9", "recompute=true", "--ranks", "2", "--no-data")
    assert said.returncode == 0 and "2 x CPU" in said.stdout and not said.stderr
    refused = run("--device", "h20")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not refused.stdout


def test_columns_stand_under_their_titles() -> None:
    rows = [{"name": "a", "size": "1"}, {"name": "longer", "size": "1,000"}, {"name": "b"}]
    assert list(table(rows)) == ["name     size", "a           1", "longer  1,000", "b"]
