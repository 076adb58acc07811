"""Against transformers' eager attention: sinks, softcap, head norms, temperature, and the masks its models draw."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attention.attention import Attention, AttentionSettings
from attention.function import attention
from attention.mask import Documents, Mask
from attention.temperature import StepTemperature
from context.rotary import DefaultRotary
from context.rotation import Rotary

pytest.importorskip("transformers")
from transformers import GptOssConfig, LlamaConfig, MistralConfig, Qwen3Config
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.qwen3 import modeling_qwen3 as qwen3

B, T, H, G, C = 2, 24, 4, 2, 8
LENGTHS = (5, 1, 18, 20, 4)
BACKENDS = ("reference", "blockwise", "auto")
MASKS = {
    "causal": Mask(),
    "window": Mask(window=5),
    "documents": Mask(documents=Documents(LENGTHS)),
    "documents, window": Mask(window=5, documents=Documents(LENGTHS)),
}


def their_mask(name: str, config=None) -> Tensor:
    """The bias (B, 1, T, T) that transformers draws: 0, or the lowest number of fp32."""
    config = config or MistralConfig(sliding_window=5)
    config._attn_implementation = "eager"
    positions_BT = torch.arange(T).expand(B, T)
    if "documents" in name:
        positions_BT = torch.cat([torch.arange(length) for length in LENGTHS]).view(B, T)
    draw = create_sliding_window_causal_mask if "window" in name else create_causal_mask
    return draw(config, torch.zeros(B, T, 1), None, None, position_ids=positions_BT, allow_is_causal_skip=False)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, GptOssConfig], ids=lambda config: config.model_type)
def test_masks_are_theirs(config, name: str) -> None:
    drawn = their_mask(name, config(sliding_window=5))[:, 0] == 0
    assert torch.equal(MASKS[name].dense(B, T, T, "cpu"), drawn)


def draw() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, C), (B, T, G, C), (B, T, G, C), (H,)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Answers, and the gradients of everything they came from."""
    assert torch.allclose(ours, theirs, atol=2e-6)
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (ours, theirs)), strict=True):
        assert b.any() and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_gpt_oss_sinks(name: str, backend: str) -> None:
    q, k, v, sink = draw()
    module = SimpleNamespace(num_key_value_groups=H // G, sinks=sink, training=False)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    theirs, _ = gpt_oss.eager_attention_forward(module, *heads, their_mask(name), C**-0.5)
    ours = attention(q, k, v, MASKS[name], sink=sink, backend=backend)
    assert isinstance(ours, Tensor)
    assert_same(ours, theirs, [q, k, v, sink])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_gemma_2_softcap(name: str, backend: str) -> None:
    q, k, v, _ = draw()
    module = SimpleNamespace(num_key_value_groups=H // G, head_dim=C, training=False)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    theirs, _ = gemma2.eager_attention_forward(module, *heads, their_mask(name), scaling=0.6, softcap=2.0)
    ours = attention(q, k, v, MASKS[name], scale=0.6, softcap=2.0, backend=backend)
    assert isinstance(ours, Tensor)
    assert_same(ours, theirs, [q, k, v])


def copied(ours: Attention, theirs: torch.nn.Module, **more: str) -> None:
    """Give our layer their weights."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", **more}
    ours.load_state_dict({f"{us}.weight": theirs.get_parameter(f"{them}.weight") for us, them in names.items()})


@pytest.mark.parametrize("name", MASKS)
def test_qwen3_head_norms(name: str) -> None:
    config = Qwen3Config(
        hidden_size=32, num_attention_heads=H, num_key_value_heads=G, head_dim=C, num_hidden_layers=1, rms_norm_eps=1e-6
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = qwen3.Qwen3Attention(config, 0)
    torch.nn.init.uniform_(theirs.q_norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(theirs.k_norm.weight, 0.5, 1.5)
    settings = AttentionSettings(num_heads=H, num_kv_heads=G, channels=C, head_norms=True)
    ours = Attention(settings, 32, window=5 if "window" in name else None)
    copied(ours, theirs, query_norm="q_norm", key_norm="k_norm")
    x_BTD, positions_BT = torch.randn(B, T, 32, requires_grad=True), torch.arange(T).expand(B, T)
    angles = qwen3.Qwen3RotaryEmbedding(config)(x_BTD, positions_BT)
    base = config.rope_parameters["rope_theta"]
    mask = Mask(documents=MASKS[name].documents)
    out = ours(x_BTD, Rotary(DefaultRotary(base=base), C).at(positions_BT), mask)
    assert_same(out, theirs(x_BTD, angles, their_mask(name))[0], [x_BTD])


def test_llama_4_temperature_without_rotation() -> None:
    config = llama4.Llama4TextConfig(
        hidden_size=32, num_attention_heads=H, num_key_value_heads=G, head_dim=C, num_hidden_layers=4,
        attn_temperature_tuning=True, floor_scale=5, attn_scale=0.3, no_rope_layers=[1, 1, 1, 0],
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = llama4.Llama4TextAttention(config, 3)
    assert not theirs.use_rope
    temperature = StepTemperature(length=5, beta=0.3, where="unrotated")
    settings = AttentionSettings(num_heads=H, num_kv_heads=G, channels=C, temperature=temperature)
    ours = Attention(settings, 32, window=None, has_rotary=False)
    copied(ours, theirs)
    x_BTD, positions_BT = torch.randn(B, T, 32, requires_grad=True), torch.arange(T).expand(B, T)
    out = ours(x_BTD, Rotary(DefaultRotary(base=10_000.0), C).at(positions_BT), Mask())
    assert_same(out, theirs(x_BTD, (None, None), their_mask("causal"))[0], [x_BTD])
