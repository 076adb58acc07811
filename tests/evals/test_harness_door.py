"""python -m evals.harness: a checkpoint, tasks by name or by file, and what is written of them."""

import importlib.util
import json
import re

import pytest
import torch

from evals.harness.__main__ import main, parse_arguments
from model.initialize import initialize
from model.transformer import build_model
from run.checkpoint import Checkpoints
from run.config import load_config
from settings import Refusal

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
CONFIG = """
total_tokens = 1024
tokens_per_step = 256
precision = "fp32"
optimizer = { kind = "adamw", learning_rate = 1e-3, schedule = { kind = "constant" } }
data = { sources = { words = { kind = "text", path = "nowhere.txt", held_out = 0.3 } } }

[model]
num_layers = 1
width = 16
feed_forward_width = 24
attention = { num_heads = 2, num_kv_heads = 1 }

[[context.stages]]
until_tokens = 1024
sequence_length = 64
rotary = { kind = "default", base = 100.0 }
"""
TASK = """
task: choose_a_word
dataset_path: json
dataset_kwargs: { data_files: DOCUMENTS, cache_dir: CACHE }
test_split: train
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metadata: { version: 2.0 }
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "tiny.toml").write_text(CONFIG)
    config = load_config(tmp_path / "tiny.toml", [])
    model = build_model(config.model, 257)
    initialize(model, 3, "cpu")
    Checkpoints(tmp_path / "run", config.checkpoint, model, [], config, print).save(4, {"step": 4, "tokens": 1024})
    return tmp_path / "run"


@pytest.fixture
def task(tmp_path):
    rows = [{"text": "der Wind" + " und" * n, "choices": ["ab", "cd", "ef"], "gold": n % 3} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TASK.replace("DOCUMENTS", str(tmp_path / "rows.jsonl")).replace("CACHE", str(tmp_path / "cache"))
    (tmp_path / "task.yaml").write_text(text)
    return tmp_path / "task.yaml"


def ask(*words: object) -> None:
    main(parse_arguments([*map(str, words), "--device", "cpu"]))


@pytest.mark.skipif(HAS_HARNESS, reason="it is there")
def test_without_the_package_it_says_how_to_get_it(run):
    with pytest.raises(Refusal, match=r"lm-eval cannot be imported .*: pip install 'longmoe\[eval\]'"):
        ask(run, "hellaswag")


@pytest.mark.skipif(not HAS_HARNESS, reason="pip install 'longmoe[eval]'")
def test_numbers_and_what_they_were_measured_with(run, task, tmp_path, capsys):
    """The run's own data is not needed: the source that the configuration names is nowhere."""
    yarn = '{ kind = "yarn", base = 100.0, factor = 2.0, original_length = 32 }'
    ask(run, task, "--limit", 5, "--rotary", yarn, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "harness.json").read_text())
    assert (report["step"], report["tokens"], report["length"], report["beyond"]) == (4, 1024, 64, "refuse")
    assert report["rotary"]["kind"] == "yarn" and report["precision"] == "float32"
    assert report["n-samples"]["choose_a_word"] == {"original": 6, "effective": 5}
    assert report["versions"] == {"choose_a_word": 2.0}
    score = report["results"]["choose_a_word"]["acc,none"]
    assert 0 <= score <= 1 and re.search(rf"choose_a_word.*acc .*{score:.4g}", capsys.readouterr().out)


@pytest.mark.skipif(not HAS_HARNESS, reason="pip install 'longmoe[eval]'")
def test_requests_that_do_not_fit_are_refused_or_cut_as_asked(run, task, capsys):
    with pytest.raises(Refusal, match=r"requests are longer than length=16; .*--beyond cut"):
        ask(run, task, "--length", 16)
    ask(run, task, "--length", 16, "--beyond", "cut")
    assert "requests are longer than length=16: their beginnings left out" in capsys.readouterr().out


def test_what_cannot_be_written_or_read_is_refused_before_anything_is_asked(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "harness.json").touch()
    with pytest.raises(Refusal, match=r"--out .*out: harness.json is there already"):
        ask(run, "hellaswag", "--out", tmp_path / "out")
    with pytest.raises(Refusal, match=r"--out .*run: holds a run or a checkpoint"):
        ask(run, "hellaswag", "--out", run)


@pytest.mark.skipif(not HAS_HARNESS, reason="pip install 'longmoe[eval]'")
@pytest.mark.parametrize("length", [0, -3])
def test_a_length_of_no_tokens_is_not_the_trained_one(run, length):
    with pytest.raises(Refusal, match=f"--length {length}: a request has tokens; give 1 or more"):
        ask(run, "hellaswag", f"--length={length}")


@pytest.mark.skipif(not HAS_HARNESS, reason="pip install 'longmoe[eval]'")
def test_the_weights_are_the_checkpoints(run, monkeypatch):
    from evals.harness.__main__ import load

    asked, _ = load(parse_arguments([str(run), "x", "--device", "cpu"]))
    fresh = build_model(asked.model.settings, 257)
    initialize(fresh, 3, "cpu")
    assert torch.equal(asked.model.head_weight, fresh.head_weight) and asked.length == 64
