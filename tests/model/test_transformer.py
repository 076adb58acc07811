"""Properties of the decoder: causality, documents, windows, ties, settings that make no sense."""

import pytest
import torch

from attention.mask import Documents, Mask
from model.loss import cross_entropy
from settings import Refusal

VOCAB_SIZE = 61


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    hidden_BTD, routing = model(tokens_BT[:, :-1])
    labels_N = tokens_BT[:, 1:].reshape(-1)
    return cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, labels_N, None, chunk=16).weighted, routing


def test_a_future_token_never_changes_the_past(either_model) -> None:
    tokens = random_tokens(2, 40)
    before, _ = either_model(tokens)
    for position in (1, 17, 39):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCAB_SIZE
        after, _ = either_model(changed)
        assert torch.equal(after[0, :position], before[0, :position])
        assert torch.equal(after[1], before[1])
        assert not torch.equal(after[0, position], before[0, position])


def test_documents_of_a_row_do_not_see_each_other(either_model) -> None:
    tokens, lengths = random_tokens(2, 40), (10, 30, 23, 17)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 40)
    packed, _ = either_model(tokens, positions, Mask(documents=Documents(lengths)))
    alone = [either_model(document.unsqueeze(0))[0].squeeze(0) for document in tokens.view(-1).split(lengths)]
    torch.testing.assert_close(packed.view(80, -1), torch.cat(alone), rtol=1e-4, atol=1e-5)
    joined, _ = either_model(tokens)
    assert not torch.allclose(joined[0, 10:], packed[0, 10:], atol=1e-2)


def test_only_the_distance_of_positions_matters(either_model) -> None:
    tokens = random_tokens(2, 24)
    shifted, _ = either_model(tokens, torch.arange(24).expand(2, 24) + 100)
    torch.testing.assert_close(shifted, either_model(tokens)[0], rtol=1e-3, atol=1e-4)


def test_pattern_gives_a_window_to_the_layers_it_names(tiny_model) -> None:
    attention = {"num_heads": 4, "num_kv_heads": 2, "window": 4}
    tokens = random_tokens(1, 30)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCAB_SIZE

    def reach(pattern: list[str]) -> int:
        """The last position that the first token changes."""
        model = tiny_model(num_layers=4, pattern=pattern, attention=attention)
        is_changed = (model(tokens)[0] != model(changed)[0]).any(dim=-1)[0]
        return int(is_changed.nonzero().max())

    assert reach(["window"]) == 4 * 3
    assert reach(["window", "full"]) == 29


def test_a_layer_without_rotation_does_not_know_positions(tiny_model) -> None:
    tokens, positions = random_tokens(2, 24), torch.randint(1000, (2, 24), generator=torch.Generator().manual_seed(1))
    attention = {"num_heads": 4, "num_kv_heads": 2, "window": 4}

    def knows(pattern: list[str], **changes: object) -> bool:
        model = tiny_model(num_layers=2, pattern=pattern, **changes)
        return not torch.equal(model(tokens)[0], model(tokens, positions)[0])

    assert knows(["full"]) and knows(["full_nope", "full"]) and knows(["window"], attention=attention)
    assert not knows(["full_nope"])
    assert not knows(["full_nope", "window_nope"], attention=attention)


def test_a_window_without_rotation_is_still_a_window(tiny_settings) -> None:
    attention = {"num_heads": 4, "num_kv_heads": 2, "window": 4}
    settings = tiny_settings(pattern=["full_nope", "window_nope", "window"], attention=attention)
    assert [settings.window(layer) for layer in range(4)] == [None, 4, 4, None]
    assert [settings.has_rotary(layer) for layer in range(4)] == [False, False, True, False]


def test_rotation_is_chosen_from_outside(tiny_model) -> None:
    from context.rotary import DefaultRotary, LinearRotary

    model, tokens = tiny_model(), random_tokens(1, 20)
    before, _ = model(tokens)
    model.use_rotary(LinearRotary(base=10_000.0, factor=4.0))
    changed, _ = model(tokens)
    assert not torch.allclose(before, changed, atol=1e-3)
    model.use_rotary(DefaultRotary(base=10_000.0))
    assert torch.equal(model(tokens)[0], before)


def test_every_parameter_learns(either_model) -> None:
    loss, _ = loss_of(either_model, random_tokens(3, 33))
    loss.backward()
    silent = [name for name, p in either_model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_tied_embeddings_are_one_parameter_that_learns_from_both_ends(tiny_model) -> None:
    model = tiny_model(tied_embeddings=True)
    assert model.head_weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    loss_of(model, tokens)[0].backward()
    # Token 0 is read, the others are only ever scored by the head.
    assert model.embedding.weight.grad.norm(dim=1).gt(0).all()


def test_dense_layers_come_first(tiny_model) -> None:
    model = tiny_model(moe=True, num_dense_layers=3)
    assert [block.is_moe for block in model.blocks] == [False, False, False, True]
    assert len(model(random_tokens(1, 5))[1]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_width": None}, "feed_forward_width is missing"),
        ({"num_dense_layers": 5, "moe": True}, r"num_dense_layers=5 must lie within 0 and num_layers=4"),
        ({"num_dense_layers": 1}, "means nothing without moe"),
        ({"pattern": ["window", "full"]}, "attention.window is left out"),
        ({"pattern": []}, "names no layer"),
        ({"attention": {"num_heads": 4, "num_kv_heads": 2, "window": 8}}, "is used by no layer"),
        ({"pattern": ["local"]}, "pattern"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tiny_settings, changes: dict, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        tiny_settings(**changes)
