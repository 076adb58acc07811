"""What a run's configuration may say of rotations."""

import pytest

from run.config import RunConfig, show
from settings import Refusal, validate

RUN = {
    "total_tokens": 64,
    "tokens_per_step": 64,
    "data": {"sources": {"a": {"kind": "local_python", "weight": 1.0}}},
    "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
    "model": {"num_layers": 2, "width": 32, "feed_forward_width": 32, "attention": {"num_heads": 4, "num_kv_heads": 2}},
}


def config(rotary: dict, **model: object) -> RunConfig:
    stage = {"until_tokens": 64, "sequence_length": 32, "rotary": rotary}
    table = RUN | {"model": RUN["model"] | model, "context": {"stages": [stage]}}
    return validate(table, RunConfig, "run")


def test_a_map_for_layers_that_do_not_exist_is_refused() -> None:
    plain = {"kind": "default", "base": 1e4}
    both = {"full": plain, "window": plain | {"base": 2e4}}
    windows = {"attention": {"num_heads": 4, "num_kv_heads": 2, "window": 4}}
    assert config(both, pattern=["full", "window"], **windows).context.stages[0].rotary.window.base == 2e4
    with pytest.raises(Refusal, match=r"stages.0.rotary.window: the model has no window layers"):
        config(both)
    with pytest.raises(Refusal, match=r"stages.0.rotary.full: the model has no full layers"):
        config(both, pattern=["window_nope"], **windows)


def test_a_rotation_that_does_not_fit_the_heads_is_refused_with_its_place() -> None:
    plain = {"kind": "default", "base": 1e4}
    with pytest.raises(Refusal, match=r"stages.0.rotary: .*share=0.1 of channels=8, 0, must be even"):
        config(plain | {"share": 0.1})
    with pytest.raises(Refusal, match=r"stages.0.rotary.window: .*share=0.1"):
        config(
            {"full": plain, "window": plain | {"share": 0.1}},
            pattern=["full", "window"],
            attention={"num_heads": 4, "num_kv_heads": 2, "window": 4},
        )


def test_notes_are_shown_as_comments(capsys: pytest.CaptureFixture) -> None:
    show(config({"kind": "llama3", "base": 1e4, "factor": 4, "original_length": 8}))
    shown = capsys.readouterr().out
    assert "\n# stage 0, rotary: 3 of 4 pairs made no whole turn within the original 8 tokens\n" in shown
