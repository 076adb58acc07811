"""Continue token sequences one token at a time, with a key/value cache."""

import torch
from torch import Tensor

from model.prefill import new_cache, prefill
from model.transformer import Transformer
from settings import Refusal


@torch.no_grad()
def generate(
    model: Transformer,
    tokens_BT: Tensor,
    num_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The `num_tokens` tokens that follow each row: int64 (B, num_tokens).

    temperature 0 takes the most likely token; above 0 it samples, from `generator` where one is given. Every row must
    be of the same length, at least 1.
    """
    if temperature < 0:
        raise Refusal(f"temperature={temperature} must be 0 (most likely token) or above")
    if tokens_BT.shape[1] < 1:
        raise Refusal("generation needs at least one token to continue; start from the tokenizer's end_of_text")
    was_training = model.training
    model.eval()
    try:
        return _continue(model, tokens_BT, num_tokens, temperature, generator)
    finally:
        model.train(was_training)


def _continue(
    model: Transformer, tokens_BT: Tensor, num_tokens: int, temperature: float, generator: torch.Generator | None
) -> Tensor:
    rows, length = tokens_BT.shape
    cache = new_cache(model, rows, length + num_tokens)
    chosen: list[Tensor] = []
    for _ in range(num_tokens):
        hidden_BD = prefill(model, tokens_BT, cache)
        tokens_BT = next_tokens(hidden_BD, model.head_weight, temperature, generator).unsqueeze(1)
        chosen.append(tokens_BT)
    return torch.cat(chosen, dim=1) if chosen else tokens_BT[:, :0]


def next_tokens(hidden_BD: Tensor, head_VD: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token a row: the most likely at temperature 0, else drawn from softmax(logits / temperature) in fp32."""
    logits_BV = (hidden_BD @ head_VD.T).float()
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    return torch.multinomial((logits_BV / temperature).softmax(dim=-1), 1, generator=generator).squeeze(1)
