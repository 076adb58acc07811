"""Before a run begins: what its layers attend with is said, and what cannot train is refused."""

from pathlib import Path

import pytest
import torch

from context.stages import Stages
from model.initialize import initialize
from model.transformer import build_model
from parallel.world import World
from run.config import load_config
from run.start import Run
from run.ways import try_layers, ways_to_attend
from settings import Refusal

TINY = Path(__file__).parents[1] / "tiny.toml"


def try_them(*overrides: str, dtype: torch.dtype = torch.float32, rank: int = 0) -> list[str]:
    config = load_config(TINY, list(overrides))
    run = Run(config, Path("runs/none"), torch.device("cpu"), dtype, World(rank, 2))
    model = build_model(config.model, 257)
    initialize(model, 0, "cpu")
    try_layers(model, Stages(config.context.stages, config.tokens_per_step)[0], run)
    return ways_to_attend(model, run)


def test_the_main_rank_says_once_what_each_kind_of_layer_attends_with(capsys: pytest.CaptureFixture[str]) -> None:
    pattern = ("model.num_layers=5", "model.pattern=['full', 'window', 'full_nope']", "model.attention.window=9")
    assert try_them(*pattern) == ["full layers by sdpa", "window layers by sdpa"]
    assert capsys.readouterr().out == "attention: full layers by sdpa, window layers by sdpa\n"
    try_them(rank=1)
    assert capsys.readouterr().out == ""


def test_a_backend_asked_for_by_name_is_the_one_that_is_said() -> None:
    assert try_them("model.attention.backend=reference") == ["full layers by reference"]
    assert try_them("model.attention.backend=blockwise", dtype=torch.bfloat16) == ["full layers by blockwise"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")
def test_a_backend_that_cannot_train_here_is_refused() -> None:
    with pytest.raises(Refusal, match=r"attention.backend='triton'"):
        try_them("model.attention.backend=triton")
