"""What a model may have that plain Llama has not: an architecture either holds it or cannot be the model."""

from collections.abc import Callable
from typing import NamedTuple

from context.rotary import AnyRotary, RotarySpec, by_view
from model.transformer import ModelSettings
from moe.choice import ExpertChoiceSettings, GroupSettings, TokenChoiceSettings
from moe.layer import MoESettings

LATENT_EPSILON = 1e-6
"""What DeepSeek-V3's norms of latents have, whatever its configuration says of the others."""


class Decoder(NamedTuple):
    """The function that weights are for: the same weights under another rotation are another model."""

    settings: ModelSettings
    rotary: AnyRotary

    def rotation(self, layer: int) -> RotarySpec | None:
        """What turns a layer's heads, None where nothing does."""
        spec = by_view(self.rotary)["full" if self.settings.window(layer) is None else "window"]
        return spec if self.settings.has_rotary(layer) else None

    @property
    def rotations(self) -> tuple[RotarySpec, ...]:
        """The different rotations of its layers, in order of depth."""
        found = map(self.rotation, range(self.settings.num_layers))
        return tuple(dict.fromkeys(spec for spec in found if spec is not None))


def without_unused(decoder: Decoder) -> Decoder:
    """The same function without experts that no layer has."""
    settings = decoder.settings
    if settings.num_dense_layers < settings.num_layers:
        return decoder
    return Decoder(settings.model_copy(update={"moe": None, "num_dense_layers": 0}), decoder.rotary)


class Trait(NamedTuple):
    """Something to hold; `words` names it in a refusal by its configuration key."""

    has: Callable[[Decoder], bool]
    words: Callable[[Decoder], str]


def traits_of(decoder: Decoder) -> frozenset[str]:
    """The names in TRAITS that are true of it."""
    return frozenset(name for name, trait in TRAITS.items() if trait.has(decoder))


def groups_of(moe: MoESettings) -> GroupSettings | None:
    """The groups of experts that a token chooses from, where its router knows any."""
    return moe.router.groups if isinstance(moe.router, TokenChoiceSettings) else None


def normalizes(moe: MoESettings) -> bool:
    """Whether the gates of a token sum to 1."""
    return not isinstance(moe.router, ExpertChoiceSettings) and moe.router.normalize


def _always(words: str) -> Callable[[object], str]:
    return lambda _: words


def _key(key: str) -> Trait:
    """A key of grouped attention that is usually left out."""
    return Trait(
        lambda d: getattr(d.settings.attention, key, None) is not None,
        lambda d: f"model.attention.{key}={_short(getattr(d.settings.attention, key))}",
    )


def _flag(key: str) -> Trait:
    """A key of grouped attention that is true."""
    return Trait(lambda d: getattr(d.settings.attention, key, False), _always(f"model.attention.{key}=true"))


def _experts(has: Callable[[MoESettings], bool], words: Callable[[MoESettings], str]) -> Trait:
    """Something of mixtures, where the decoder is one."""
    return Trait(
        lambda d: d.settings.moe is not None and has(d.settings.moe),
        # What an architecture needs it needs of any mixture: these words ask nothing of one.
        lambda d: words(d.settings.moe),  # type: ignore[arg-type]
    )


def _windows(decoder: Decoder) -> set[bool]:
    return {decoder.settings.window(layer) is not None for layer in range(decoder.settings.num_layers)}


def _is_partial(decoder: Decoder) -> bool:
    return any(getattr(spec, "share", None) not in (None, 1.0) for spec in decoder.rotations)


def _epsilon(decoder: Decoder) -> float:
    """What norms inside attention have there."""
    return LATENT_EPSILON if decoder.settings.attention.kind == "latent" else decoder.settings.norm_epsilon


def _has_other_epsilon(decoder: Decoder) -> bool:
    attention = decoder.settings.attention
    has_norms = attention.kind == "latent" or attention.head_norms
    return has_norms and attention.norm_epsilon != _epsilon(decoder)


def _has_other_groups(moe: MoESettings) -> bool:
    groups = groups_of(moe)
    return groups is not None and groups.score != "top2"


def _short(value: object) -> str:
    return f"{{ kind = {value.kind!r}, ... }}" if hasattr(value, "kind") else str(value)


def _pattern(decoder: Decoder) -> str:
    return f"model.pattern={list(decoder.settings.pattern)}"


TRAITS = {
    "experts": Trait(lambda d: d.settings.moe is not None, _always("model.moe")),
    "latent": Trait(lambda d: d.settings.attention.kind == "latent", _always('model.attention.kind="latent"')),
    "head_norms": _flag("head_norms"),
    "uneven_heads": Trait(
        lambda d: d.settings.width % d.settings.attention.num_heads > 0,
        lambda d: f"model.width={d.settings.width} (no multiple of num_heads={d.settings.attention.num_heads})",
    ),
    "window": Trait(lambda d: _windows(d) == {True}, _pattern),
    "some_windows": Trait(lambda d: len(_windows(d)) == 2, lambda d: f"{_pattern(d)} (windows on some layers)"),
    "nope": Trait(
        lambda d: None in map(d.rotation, range(d.settings.num_layers)),
        lambda d: f"{_pattern(d)} (layers without a rotation)",
    ),
    "two_rotations": Trait(lambda d: len(d.rotations) > 1, _always("a rotary for full and another for window layers")),
    "partial": Trait(_is_partial, _always("a rotary with a share of channels")),
    "dense_first": Trait(
        lambda d: d.settings.moe is not None and d.settings.num_dense_layers > 0,
        lambda d: f"model.num_dense_layers={d.settings.num_dense_layers}",
    ),
    "raw_gates": _experts(
        lambda m: isinstance(m.router, TokenChoiceSettings) and not m.router.normalize,
        _always("model.moe.router.normalize=false"),
    ),
    "scaled_gates": _experts(lambda m: m.router.scale != 1.0, lambda m: f"model.moe.router.scale={m.router.scale}"),
    "sigmoid": _experts(lambda m: m.router.kind == "sigmoid", _always('model.moe.router.kind="sigmoid"')),
    "bias": _experts(lambda m: m.has_bias, _always('model.moe.balance.kind="bias"')),
    "groups": _experts(lambda m: groups_of(m) is not None, _always("model.moe.router.groups")),
    "shared": _experts(
        lambda m: m.num_shared_experts > 0 and not m.shared_gate,
        lambda m: f"model.moe.num_shared_experts={m.num_shared_experts} (without shared_gate)",
    ),
    "gated_shared": _experts(lambda m: m.shared_gate, _always("model.moe.shared_gate=true")),
    # What no architecture of the table holds.
    "softcap": _key("softcap"),
    "scale": _key("scale"),
    "temperature": _key("temperature"),
    "sink": _flag("sink"),
    "other_epsilon": Trait(
        _has_other_epsilon,
        lambda d: f"model.attention.norm_epsilon={d.settings.attention.norm_epsilon} (there it is {_epsilon(d)})",
    ),
    "other_router": _experts(
        lambda m: m.router.kind not in ("softmax", "sigmoid"), lambda m: f'model.moe.router.kind="{m.router.kind}"'
    ),
    "null_experts": _experts(lambda m: m.null_experts is not None, _always("model.moe.null_experts")),
    "other_groups": _experts(_has_other_groups, _always('model.moe.router.groups.score="max"')),
    "one_expert": _experts(lambda m: m.num_experts < 2, _always("model.moe.num_experts=1")),
}
