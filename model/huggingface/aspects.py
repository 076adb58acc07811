"""What every architecture has: each aspect writes a few keys of a config.json, and reads the same keys back.

`write` takes the decoder to keys of config.json, `read` takes a config.json to keys of ModelSettings, as TOML would
give them. Reading follows transformers where a key is missing; what it cannot read rightly it refuses by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from attention.attention import AttentionSettings
from model.huggingface.traits import LATENT_EPSILON, Decoder
from settings import Refusal, Table

Config = Mapping[str, Any]


class Aspect(NamedTuple):
    """Both ways of one part of a configuration."""

    write: Callable[[Decoder], Table]
    read: Callable[[Config], Table]


class Missing(NamedTuple):
    """Stands for no default."""


def given(config: Config, key: str, default: object = Missing()) -> Any:
    """The value of a key; raises Refusal where it is missing and has no default."""
    value = config.get(key)
    if value is None and isinstance(default, Missing):
        raise Refusal(f"config.json: has no {key}; it is no configuration of {config.get('model_type', 'a model')}")
    return default if value is None else value


def stated(config: Config, key: str) -> Any:
    """The value of a key that may be null but not be missing, as transformers has a number for it then."""
    if key not in config:
        raise Refusal(f"config.json: has no {key}; say null where there is none")
    return config[key]


def refuse_others(config: Config, **allowed: object) -> None:
    """Refuse keys with another value than the one that our decoder is; a key left out has that value."""
    for key, value in allowed.items():
        found = config.get(key)
        if found is not None and found != value:
            raise Refusal(f"config.json: {key}={found!r}: this decoder is only {key}={value!r}")


def decoder(*, is_tied: bool = False) -> Aspect:
    """Width, depth and norms. is_tied: whether the embedding is the head where a file does not say so."""

    def write(d: Decoder) -> Table:
        return {
            "hidden_size": d.settings.width,
            "num_hidden_layers": d.settings.num_layers,
            "hidden_act": "silu",
            "rms_norm_eps": d.settings.norm_epsilon,
            "initializer_range": d.settings.initial_std,
            "tie_word_embeddings": d.settings.tied_embeddings,
        }

    def read(config: Config) -> Table:
        refuse_others(config, hidden_act="silu", attention_bias=False, mlp_bias=False, clip_qkv=None)
        if config.get("quantization_config") is not None:
            raise Refusal("config.json: quantization_config: weights of low precision are not read; convert them first")
        return {
            "width": given(config, "hidden_size"),
            "num_layers": given(config, "num_hidden_layers"),
            "norm_epsilon": given(config, "rms_norm_eps"),
            "initial_std": given(config, "initializer_range", 0.02),
            "tied_embeddings": given(config, "tie_word_embeddings", is_tied),
        }

    return Aspect(write, read)


def grouped(*, head_norms: bool | str = False, channels: int | None = None, is_grouped: bool = True) -> Aspect:
    """Grouped-query attention. head_norms: whether it has them, or the key that says so.

    channels: of a head, where the width does not say it. is_grouped: false where the number of key heads may be missing
    and is then that of the query heads.
    """

    def write(d: Decoder) -> Table:
        attention, width = d.settings.attention, d.settings.width
        assert isinstance(attention, AttentionSettings), "an architecture of grouped attention was chosen"
        keys: Table = {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "head_dim": attention.channels or width // attention.num_heads,
            "attention_bias": False,
        }
        return keys | ({head_norms: attention.head_norms} if isinstance(head_norms, str) else {})

    def read(config: Config) -> Table:
        heads, width = given(config, "num_attention_heads"), given(config, "hidden_size")
        head_channels = given(config, "head_dim", channels or width // heads)
        has_norms = given(config, head_norms, False) if isinstance(head_norms, str) else head_norms
        kv_heads = stated(config, "num_key_value_heads") if is_grouped else config.get("num_key_value_heads")
        attention: Table = {
            "num_heads": heads,
            "num_kv_heads": kv_heads or heads,
            "head_norms": has_norms,
            "norm_epsilon": given(config, "rms_norm_eps"),
        }
        if head_channels * heads != width:
            attention["channels"] = head_channels
        return {"attention": attention}

    return Aspect(write, read)


def latent() -> Aspect:
    """Multi-head latent attention; num_key_value_heads is only there for those who ask for it."""
    ranks = {"latent_rank": "kv_lora_rank", "query_rank": "q_lora_rank"}
    channels = {
        "nope_channels": "qk_nope_head_dim",
        "rope_channels": "qk_rope_head_dim",
        "value_channels": "v_head_dim",
    }
    names = {"num_heads": "num_attention_heads", **ranks, **channels}

    def write(d: Decoder) -> Table:
        keys = {theirs: getattr(d.settings.attention, ours) for ours, theirs in names.items()}
        # Their default query rank is not none: it has to be written.
        others = {"num_key_value_heads": keys["num_attention_heads"], "attention_bias": False, "rope_interleave": True}
        return keys | others

    def read(config: Config) -> Table:
        attention = {ours: given(config, theirs) for ours, theirs in names.items() if ours != "query_rank"}
        attention["query_rank"] = stated(config, "q_lora_rank")
        return {"attention": {"kind": "latent", **attention, "norm_epsilon": LATENT_EPSILON}}

    return Aspect(write, read)


def dense() -> Aspect:
    """One feed-forward for every layer."""
    return Aspect(
        lambda d: {"intermediate_size": d.settings.feed_forward_width, "mlp_bias": False},
        lambda config: {"feed_forward_width": given(config, "intermediate_size")},
    )
