"""Tensors of another model are refused by name before any is loaded."""

import pytest
import torch
from torch import nn

from checkpoint.fit import check_weights
from settings import Refusal


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight": None}, "weight: not in the checkpoint"),
        ({"other": torch.zeros(2)}, r"other: only in the checkpoint, \(2,\)"),
        ({"weight": torch.zeros(3, 2)}, r"weight: \(3, 2\) float32 in the checkpoint, \(2, 3\) float32 here"),
        ({"bias": torch.zeros(2).half()}, r"bias: \(2,\) float16 in the checkpoint"),
    ],
)
def test_weights_of_another_model_are_refused(change: dict[str, torch.Tensor | None], named: str) -> None:
    model = nn.Linear(3, 2)
    check_weights("runs/x", model.state_dict(), model)
    weights = {name: tensor for name, tensor in {**model.state_dict(), **change}.items() if tensor is not None}
    with pytest.raises(Refusal, match=f"(?s)runs/x: its model.safetensors .*{named}"):
        check_weights("runs/x", weights, model)
