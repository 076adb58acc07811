"""Which of our tensors are which of theirs: one list, from which weights go both ways, so that the ways are inverse."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.latent import LatentSettings
from model.huggingface.architectures import Architecture
from model.transformer import ModelSettings

ATTENTION = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
}
LATENT = {
    "query_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "query": "q_b_proj",
    "latent": "kv_a_proj_with_mqa",
    "latent_norm": "kv_a_layernorm",
    "expand": "kv_b_proj",
    "output": "o_proj",
}


@dataclass(frozen=True)
class Part:
    """One tensor of ours, and those of theirs that it is: joined along their rows, one set for each expert."""

    ours: str
    theirs: tuple[str, ...]
    """With {expert} where ours holds all experts."""
    order: Tensor | None = None
    """Which of our rows are theirs, where they stand in another order."""

    @property
    def is_stacked(self) -> bool:
        """Whether ours has the experts as its first dimension."""
        return "{expert}" in self.theirs[0]

    def cut(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Their tensors under their names, views of ours where the order of rows allows."""
        whole = ours if self.order is None else ours[self.order.to(ours.device)]
        for expert, one in enumerate(whole) if self.is_stacked else ((0, whole),):
            for name, piece in zip(self.theirs, one.chunk(len(self.theirs)), strict=True):
                yield name.format(expert=expert), piece

    def join(self, read: Callable[[str], Tensor], ours: Tensor) -> Tensor:
        """Ours from what `read` finds under their names; `ours` has its shape, its values are not looked at."""
        experts = range(len(ours)) if self.is_stacked else range(1)
        sets = [torch.cat([read(name.format(expert=expert)) for name in self.theirs]) for expert in experts]
        whole = torch.stack(sets) if self.is_stacked else sets[0]
        return whole if self.order is None else whole[self.order.argsort()]


@dataclass(frozen=True)
class Layout:
    """All tensors of a model: those that are on both sides, and those that only theirs has, which hold zeros."""

    parts: tuple[Part, ...]
    zeros: Mapping[str, torch.Size]

    def export(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Their tensors, one after the other."""
        for part in self.parts:
            yield from part.cut(weights[part.ours])
        for name, shape in self.zeros.items():
            yield name, torch.zeros(shape)


def layout_of(architecture: Architecture, settings: ModelSettings) -> Layout:
    """The layout of this model in that architecture's files."""
    parts = [Part("embedding.weight", ("model.embed_tokens.weight",)), Part("norm.weight", ("model.norm.weight",))]
    if not settings.tied_embeddings:
        parts.append(Part("head.weight", ("lm_head.weight",)))
    zeros: dict[str, torch.Size] = {}
    for layer in range(settings.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        parts.append(Part(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",)))
        parts.append(Part(f"{ours}feed_forward_norm.weight", (f"{theirs}post_attention_layernorm.weight",)))
        parts += _attention(settings, f"{ours}attention.", f"{theirs}self_attn.")
        if settings.feed_forward_kind(layer) == "dense":
            parts += _dense(f"{ours}feed_forward.", f"{theirs}mlp.")
        else:
            prefix = f"{theirs}{architecture.mlp}."
            parts += _experts(architecture, settings, f"{ours}feed_forward.", prefix)
            zeros |= _only_theirs(architecture, settings, prefix)
    return Layout(tuple(parts), zeros)


def _attention(settings: ModelSettings, ours: str, theirs: str) -> Iterator[Part]:
    attention = settings.attention
    names, order = dict(ATTENTION), {}
    if isinstance(attention, LatentSettings):
        names, order = dict(LATENT), interleaved_rows(attention)
        if attention.query_rank is None:
            names = {"query": "q_proj"} | {k: v for k, v in names.items() if not k.startswith("query")}
    elif not attention.head_norms:
        names = {k: v for k, v in names.items() if not k.endswith("norm")}
    for name, their_name in names.items():
        yield Part(f"{ours}{name}.weight", (f"{theirs}{their_name}.weight",), order.get(name))


def interleaved_rows(attention: LatentSettings) -> dict[str, Tensor]:
    """DeepSeek's files have the two channels of a rotated pair side by side; ours are first half with second half."""
    plain, turned, rank = attention.nope_channels, attention.rope_channels, attention.latent_rank
    pairs = torch.arange(turned).view(2, -1).T.flatten()
    head = torch.cat((torch.arange(plain), plain + pairs))
    heads = torch.arange(attention.num_heads)[:, None] * (plain + turned)
    return {"query": (heads + head).flatten(), "latent": torch.cat((torch.arange(rank), rank + pairs))}


def _dense(ours: str, theirs: str) -> Iterator[Part]:
    yield Part(f"{ours}gate_up.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"))
    yield Part(f"{ours}down.weight", (f"{theirs}down_proj.weight",))


def _experts(architecture: Architecture, settings: ModelSettings, ours: str, theirs: str) -> Iterator[Part]:
    moe = settings.moe
    assert moe is not None
    gate, up, down = (f"{theirs}experts.{{expert}}.{name}.weight" for name in architecture.expert_names)
    yield Part(f"{ours}router.weight", (f"{theirs}gate.weight",))
    yield Part(f"{ours}experts.gate_up", (gate, up))
    yield Part(f"{ours}experts.down", (down,))
    if moe.has_bias:
        yield Part(f"{ours}router.bias_E", (f"{theirs}gate.e_score_correction_bias",))
    if moe.num_shared_experts:
        # Theirs is one expert with a gate, or several without.
        shared = f"{theirs}shared_expert" + ("" if moe.shared_gate else "s")
        yield from _dense(f"{ours}shared.", f"{shared}.")
        if moe.shared_gate:
            yield Part(f"{ours}shared.gate.weight", (f"{shared}_gate.weight",))


def _only_theirs(architecture: Architecture, settings: ModelSettings, theirs: str) -> Iterator[tuple[str, torch.Size]]:
    """What an architecture with a bias and shared experts has in any case: a bias of 0, and experts without width."""
    moe = settings.moe
    assert moe is not None
    if "bias" in architecture.holds and not moe.has_bias:
        yield f"{theirs}gate.e_score_correction_bias", torch.Size((moe.num_experts,))
    if "shared" in architecture.holds and not moe.num_shared_experts:
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (settings.width, 0) if name == "down_proj" else (0, settings.width)
            yield f"{theirs}shared_experts.{name}.weight", torch.Size(shape)
