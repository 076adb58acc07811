"""Generation with a cache against the whole sequence run again for every token."""

import pytest
import torch

from model.generate import generate
from settings import Refusal

VOCAB_SIZE = 61


def without_cache(model, tokens_BT: torch.Tensor, num_tokens: int) -> torch.Tensor:
    for _ in range(num_tokens):
        hidden_BTD, _ = model(tokens_BT)
        following = (hidden_BTD[:, -1] @ model.head_weight.T).argmax(dim=-1, keepdim=True)
        tokens_BT = torch.cat([tokens_BT, following], dim=1)
    return tokens_BT[:, -num_tokens:]


def prompts(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(5))


def test_the_cache_changes_nothing(either_model) -> None:
    expected = without_cache(either_model, prompts(), 20)
    assert torch.equal(generate(either_model, prompts(), 20), expected)
    assert len(expected.unique()) > 5


def test_windows_reach_as_far_with_a_cache(tiny_model) -> None:
    attention = {"num_heads": 4, "num_kv_heads": 2, "window": 5, "head_norms": True}
    model = tiny_model(pattern=["window", "full"], attention=attention)
    assert torch.equal(generate(model, prompts(), 20), without_cache(model, prompts(), 20))


def test_one_token_is_enough_to_start_and_zero_to_stop(tiny_model) -> None:
    model = tiny_model()
    assert torch.equal(generate(model, prompts(length=1), 6), without_cache(model, prompts(length=1), 6))
    assert generate(model, prompts(), 0).shape == (3, 0)


def test_sampling_follows_the_distribution_and_its_seed(tiny_model) -> None:
    model, prompt = tiny_model(), prompts(rows=1)
    many = prompt.expand(4000, -1)
    drawn = generate(model, many, 1, temperature=1.5, generator=torch.Generator().manual_seed(0)).flatten()
    again = generate(model, many, 1, temperature=1.5, generator=torch.Generator().manual_seed(0)).flatten()
    assert torch.equal(drawn, again)
    expected = (model(prompt)[0][0, -1] @ model.head_weight.T / 1.5).softmax(dim=-1)
    share = torch.bincount(drawn, minlength=VOCAB_SIZE) / 4000
    assert (share - expected).abs().max() < 0.03


def test_mode_is_restored_and_nothing_needs_a_gradient(tiny_model) -> None:
    model = tiny_model().train()
    assert not generate(model, prompts(), 2).requires_grad
    assert model.training


def test_impossible_requests_are_refused(tiny_model) -> None:
    with pytest.raises(Refusal, match="temperature=-1"):
        generate(tiny_model(), prompts(), 2, temperature=-1)
    with pytest.raises(Refusal, match="at least one token"):
        generate(tiny_model(), prompts(length=0), 2)
