"""The doors: a run out to Hugging Face and back in, and on from there."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train
from checkpoint.checkpoints import Checkpoints, read_checkpoint
from checkpoint.identity import read_recorded
from data.published import PublishedSettings
from data.tokenizer import build_tokenizer
from evals.__main__ import load_checkpoint
from model.__main__ import export_run, import_folder, parse_arguments
from model.initialize import initialize
from model.transformer import build_model
from run import record
from run.config import RunConfig, load_config
from settings import Refusal

TINY = Path(__file__).parents[2] / "tiny.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with checkpoints of steps 8 and 12: the last of stage 0 and of stage 1."""
    folder = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    letters = (torch.randint(97, 123, (12_000,), generator=generator)).tolist()
    (folder / "words.txt").write_text(re.sub("[aeiou]", " ", bytes(letters).decode()).replace("z", "\n\n"))
    paths = [f"data.sources.words.path={folder / 'words.txt'}", f"data.prepared={folder / 'prepared'}"]
    config = load_config(TINY, paths)
    model = build_model(config.model, 257)
    initialize(model, 3, "cpu")
    checkpoints = Checkpoints(folder / "run", config.checkpoint, model, [], config, print)
    for step in (8, 12):
        checkpoints.save(step, {"step": step, "tokens": 512 * step})
    checkpoints.close()
    return folder / "run"


@pytest.fixture(autouse=True)
def _signals():
    """Training sets handlers; they are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def door(*words: object) -> None:
    arguments = parse_arguments([str(word) for word in words])
    arguments.main(arguments)


def test_out_and_in_again_bit_for_bit(run, tmp_path, capsys):
    door("export", run, tmp_path / "hf")
    door("import", tmp_path / "hf", tmp_path / "back")
    said = capsys.readouterr().out
    assert f"written: {tmp_path / 'hf'}, Glm4MoeForCausalLM of step 12" in said and "initial.checkpoint" in said
    _, _, before = read_checkpoint(run)
    state, text, after = read_checkpoint(tmp_path / "back")
    assert state["tokens"] == 0 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = read_recorded(text, RunConfig, "back")
    assert config.context.stages[0].rotary.kind == "yarn" and config.context.stages[0].sequence_length == 128
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf"], "nothing half-written"


def test_a_checkpoint_has_the_rotation_and_length_of_its_last_step(run, tmp_path):
    door("export", run / "checkpoints" / "step_00000008", tmp_path / "hf", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}
    assert (config["max_position_embeddings"], config["dtype"]) == (64, "bfloat16")


def test_an_imported_checkpoint_is_asked_and_trained_on(run, tmp_path, monkeypatch):
    door("export", run, tmp_path / "hf")
    words = run.parent / "words.txt"
    source = f'data.sources={{ words = {{ kind = "text", path = "{words}", held_out = 0.1 }} }}'
    door("import", tmp_path / "hf", tmp_path / "back", source, f"data.prepared={run.parent / 'prepared'}")
    loaded, original = load_checkpoint(tmp_path / "back", "cpu"), load_checkpoint(run, "cpu")
    tokens_BT = torch.randint(257, (1, 100))
    with torch.no_grad():
        ours, theirs = (one.model.eval()(tokens_BT)[0] for one in (loaded, original))
    assert torch.equal(ours, theirs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "write_report", lambda folder: folder)
    stage = '{ until_tokens = 512, sequence_length = 64, rotary = { kind = "default", base = 1e4 } }'
    initial = f'initial={{ checkpoint = "{tmp_path / "back"}" }}'
    changes = [
        initial,
        "total_tokens=512",
        f"context.stages=[{stage}]",
        "evals.tasks=[]",
        "optimizer.learning_rate=1e-9",
    ]
    train.main(load_config(TINY, ["name=on", f"data.sources.words.path={words}", *changes]))
    _, _, before = read_checkpoint(tmp_path / "back")
    _, _, after = read_checkpoint(tmp_path / "runs" / "on")
    change = max((before[name] - after[name]).abs().max() for name in before if "bias_E" not in name)
    assert 0 < change < 1e-6, "it began where the import stands"


def test_a_tokenizer_of_their_own_comes_along(run, tmp_path):
    door("export", run, tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer.json"
    # As many ids as the model has, but others: 255 bytes and one merge, so to speak.
    table = json.loads(file.read_text())
    table["model"]["vocab"]["ab"] = table["model"]["vocab"].pop("\u0000".translate({0: "Ā"}))
    table["model"]["merges"] = [["a", "b"]]
    file.write_text(json.dumps(table))
    door("import", tmp_path / "hf", tmp_path / "back")
    shutil.rmtree(tmp_path / "hf")
    settings = read_recorded(read_checkpoint(tmp_path / "back")[1], RunConfig, "back").data.tokenizer
    assert settings == PublishedSettings(
        file=str(tmp_path / "back" / "tokenizer.json"), end_of_text="<|endoftext|>", vocab_size=257
    )
    assert build_tokenizer(settings).encode("aab") == [97, 0]
    (tmp_path / "back" / "tokenizer.json").write_text("{}")
    with pytest.raises(Refusal, match=r"this checkpoint is damaged: tokenizer.json"):
        read_checkpoint(tmp_path / "back")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.norm_epsilon=1e-3", "model.norm_epsilon"),
        ("model.tied_embeddings=true", "model.tied_embeddings"),
        ("context.stages.0.rotary.factor=8.0", "context.stages.0.rotary.factor"),
        (
            "context={ stages = [{ until_tokens = 128, sequence_length = 128, rotary = { kind = 'none' } }] }",
            "context.stages.0.rotary",
        ),
        ("data.tokenizer={ kind = 'integers', size = 257 }", "data.tokenizer.kind"),
    ],
)
def test_what_the_weights_are_cannot_be_given(override, key, run, tmp_path):
    door("export", run, tmp_path / "hf")
    with pytest.raises(
        Refusal, match=rf"(?s)hf: {re.escape(key)}.* -> .*what the weights are: leave it out"
    ) as refusal:
        door("import", tmp_path / "hf", tmp_path / "back", override)
    assert "initial.checkpoint" in str(refusal.value) and not (tmp_path / "back").exists()


def test_what_weights_do_not_decide_can_be_given(run, tmp_path):
    door("export", run, tmp_path / "hf")
    changes = ["name=other", "context.stages.0.sequence_length=64", "optimizer.learning_rate=0.5", "seed=3"]
    door("import", tmp_path / "hf", tmp_path / "back", *changes)
    config = read_recorded(read_checkpoint(tmp_path / "back")[1], RunConfig, "back")
    assert (config.name, config.stages[0].sequence_length, config.seed) == ("other", 64, 3)


def test_what_is_there_is_not_written_over(run, tmp_path):
    door("export", run, tmp_path / "hf")
    (tmp_path / "back").mkdir()
    for out, match in (("back", "is already there"), ("step_00000003", "would be taken for a step of a run")):
        with pytest.raises(Refusal, match=match):
            door("import", tmp_path / "hf", tmp_path / out)
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(Refusal, match=re.escape("config.json: has no vocab_size")):
        door("import", tmp_path / "hf", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf"] and not any((tmp_path / "back").iterdir())


def test_the_doors_name_their_functions():
    assert parse_arguments(["export", "a", "b"]).main is export_run
    assert parse_arguments(["import", "a", "b", "x=1"]).main is import_folder
