"""Models whose answers are known: what they score says whether scoring asks and counts rightly."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from data.tokenizer import ByteSettings, build_tokenizer
from evals.scoring import Materials

VOCAB = 257


class CopyOracle(nn.Module):
    """Looks up what followed the text since the last question mark, up to `reach` tokens back; uniform elsewhere.

    Its hidden states are logits and its head the identity.
    """

    def __init__(self, reach: int | None = None) -> None:
        super().__init__()
        self.reach = reach
        self.head_weight = nn.Parameter(torch.eye(VOCAB))

    def forward(self, tokens_BT, positions_BT=None, mask=None):
        hidden_BTD = torch.zeros(*tokens_BT.shape, VOCAB)
        for row, tokens in enumerate(tokens_BT.tolist()):
            text = bytes(min(token, 255) for token in tokens)
            question = text.rfind(b"?")
            for place in range(question + 1, len(text)) if question >= 0 else ():
                found = text.find(text[question + 1 : place + 1], 0, question)
                after = found + place - question
                if found >= 0 and (self.reach is None or place - after < self.reach):
                    hidden_BTD[row, place, text[after]] = 30.0
        return hidden_BTD, ()


class Seer(nn.Module):
    """Is told the next token of a known text from position `start` of the window on; knows nothing before."""

    def __init__(self, text: np.ndarray, start: int = 0) -> None:
        super().__init__()
        self.follows = {tuple(text[i : i + 8].tolist()): int(text[i + 8]) for i in range(len(text) - 8)}
        self.start = start
        self.head_weight = nn.Parameter(torch.eye(VOCAB))

    def forward(self, tokens_BT, positions_BT=None, mask=None):
        hidden_BTD = torch.zeros(*tokens_BT.shape, VOCAB)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for place in range(max(self.start, 7), len(tokens)):
                hidden_BTD[row, place, self.follows[tuple(tokens[place - 7 : place + 1])]] = 40.0
        return hidden_BTD, ()


class RandomModel(nn.Module):
    """An embedding and a head that nobody trained: every answer is a guess. `experts` makes it report routing."""

    def __init__(self, experts: int = 0, layers: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Parameter(torch.randn(VOCAB, 16, generator=generator))
        self.head_weight = nn.Parameter(torch.randn(VOCAB, 16, generator=generator) / 8)
        self.drop = nn.Dropout(0.5)
        self.experts, self.layers = experts, layers
        self.calls: list[SimpleNamespace] = []

    def forward(self, tokens_BT, positions_BT=None, mask=None):
        call = SimpleNamespace(tokens_BT=tokens_BT, positions_BT=positions_BT, mask=mask)
        call.is_grad_enabled, call.is_autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        self.calls.append(call)
        hidden_BTD = self.drop(self.embedding[tokens_BT].cumsum(1) / tokens_BT.shape[1])
        layers = range(self.layers) if self.experts else ()
        return hidden_BTD, tuple(self.stats(self.route(tokens_BT, layer)) for layer in layers)

    def stats(self, chosen_N):
        counts_E = torch.bincount(chosen_N, minlength=self.experts)
        return SimpleNamespace(counts_E=counts_E, selected_NK=chosen_N[:, None], num_experts=self.experts)

    def route(self, tokens_BT, layer):
        """Layer 0 shares the tokens out evenly over all experts but the last; layer 1 sends all to expert 0."""
        if layer == 0:
            return tokens_BT.flatten() % (self.experts - 1)
        return torch.zeros(tokens_BT.numel(), dtype=torch.int64)


@pytest.fixture(scope="session")
def models():
    return SimpleNamespace(CopyOracle=CopyOracle, Seer=Seer, RandomModel=RandomModel)


@pytest.fixture(scope="session")
def haystack():
    """Lower-case text without question marks: documents of 40 to 900 bytes, one of 5,000."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz .,\n", dtype=np.uint8)
    lengths = [*rng.integers(40, 900, size=20).tolist(), 5_000]
    end = np.array([256])
    return np.concatenate([part for length in lengths for part in (rng.choice(letters, size=length), end)]).astype(
        np.uint16
    )


@pytest.fixture
def materials(haystack):
    return Materials(
        tokenizer=build_tokenizer(ByteSettings()),
        held_out={"web": haystack, "small": haystack[:50]},
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
    )
