"""Rotary position out of Hugging Face's configurations and into them, so that transformers computes the same numbers.

Version 5 has `rope_parameters`, one table or one for each layer type; version 4 had `rope_scaling` beside `rope_theta`.
What is read is what transformers 5.23 makes of a file, and what it would pass over in silence is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from context.frequencies import FREQUENCIES, longrope_factor, ntk_base, powers, sharpening, turned_channels, yarn_factor
from context.rotary import (
    AnyRotary,
    DefaultRotary,
    DynamicRotary,
    Length,
    LinearRotary,
    Llama3Rotary,
    LongRotary,
    NoRotary,
    NtkRotary,
    ProportionalRotary,
    RotaryMap,
    RotarySpec,
    YarnRotary,
    by_view,
)
from settings import Refusal, Section, Table, nearest, validate

KINDS: dict[str, type[Section]] = {
    "default": DefaultRotary,
    "linear": LinearRotary,
    "dynamic": DynamicRotary,
    "yarn": YarnRotary,
    "llama3": Llama3Rotary,
    "longrope": LongRotary,
    "proportional": ProportionalRotary,
}
"""Their types, and what each is here."""

NAMES = {
    "rope_theta": "base",
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "short_factor": "short",
    "long_factor": "long",
}
"""Their keys, and what each is called here; `partial_rotary_factor` is a `share`, or of proportional the `pairs`."""

VIEWS = {"full_attention": "full", "sliding_attention": "window"}
"""Their layer types, and what each sees."""

SCALES_FULL_LAYERS_ONLY = {"gemma3", "gemma3_text", "olmo3"}
"""Model types whose `rope_scaling` was never meant for window layers; transformers knows that by the type alone."""


class _Read(Section):
    rotary: AnyRotary


class _Rope(Section, extra="ignore"):
    """What is looked at before a rotation's own settings are checked; any of it may be null."""

    type: str | None = None
    rope_type: str | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Length | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


class _Ropes(_Rope):
    full_attention: _Rope | None = None
    sliding_attention: _Rope | None = None


class RotaryKeys(Section, extra="ignore"):
    """The types of what is read here of a config.json."""

    model_type: str | None = None
    rope_parameters: _Ropes | None = None
    rope_scaling: _Ropes | None = None
    partial_rotary_factor: float | None = None
    max_position_embeddings: Length | None = None
    original_max_position_embeddings: Length | None = None
    kv_lora_rank: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


def from_huggingface(config: Mapping[str, Any], length: int | None = None) -> AnyRotary:
    """The rotation that a `config.json` describes, of version 5 or 4. Raises Refusal.

    length: of the texts it will be used for, on which `dynamic` and `longrope` depend; left out, the configuration's
    max_position_embeddings. Latent attention (`kv_lora_rank`) gets the attention factor that ours needs.
    """
    validate(config, RotaryKeys, "config.json")
    if config.get("rope_parameters") and config.get("rope_scaling"):
        raise Refusal("rope_parameters and rope_scaling are both there, and only one can be right: remove the other")
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    tables = _tables(config)
    nested = {name: table for name, table in tables.items() if name in VIEWS}
    if not nested:
        return _read(tables, config, where, length)
    for name, value in tables.items():
        if name not in {*VIEWS, "truncate"}:
            what = "layer type" if isinstance(value, Mapping) else "key beside layer types"
            raise Refusal(f"rope_parameters.{name}: unknown {what}{nearest(name, list(VIEWS))}")
    specs = [_read_nested(name, tables, config, length) for name in VIEWS if name in nested]
    full, window = specs if len(specs) == 2 else specs * 2
    return full if full == window else RotaryMap(full=full, window=window)


def _tables(config: Mapping[str, Any]) -> Table:
    """`rope_parameters` as version 5 has them, also of a file of version 4."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    plain = {"rope_theta": config.get("rope_theta")}
    scaled = {**plain, **(config.get("rope_scaling") or {})}
    local = config.get("rope_local_base_freq")
    if local is not None or config.get("model_type") in SCALES_FULL_LAYERS_ONLY:
        return {"full_attention": scaled, "sliding_attention": plain if local is None else {"rope_theta": local}}
    return scaled


def _read_nested(name: str, tables: Table, config: Mapping[str, Any], length: int | None) -> RotarySpec:
    if tables[name] is None:
        return NoRotary()
    table = dict(tables[name])
    # transformers reads `truncate` beside the layer types even where it is nested (_compute_yarn_parameters).
    outer, inner = tables.get("truncate", True), table.pop("truncate", None)
    if inner is not None and inner != outer:
        raise Refusal(
            f"rope_parameters.{name}.truncate={inner}: transformers passes it over, as it reads truncate beside the "
            f"layer types; write rope_parameters.truncate={inner} there, or leave it out"
        )
    if table.get("rope_type", table.get("type")) == "yarn":
        table["truncate"] = outer
    # Nested tables have their own original length: that of the model as a whole is not looked at.
    outside = {key: value for key, value in config.items() if key != "original_max_position_embeddings"}
    return _read(table, outside, f"rope_parameters.{name}", length)


def _read(table: Mapping[str, Any], config: Mapping[str, Any], where: str, length: int | None) -> RotarySpec:
    """One table; `config` has what it may leave out."""
    table = {key: value for key, value in table.items() if value is not None}
    written = table.pop("type", "default")
    name = table.pop("rope_type", written)
    if name not in KINDS:
        raise Refusal(f"{where}: unknown rope_type {name!r}{nearest(str(name), list(KINDS))}")
    share = table.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    on_all = table.get("mscale_all_dim") or 0.0
    table = _completed(name, table, config, where)
    fields = KINDS[name].model_fields
    known = [theirs for theirs, ours in NAMES.items() if ours in fields and not _is_passed_over(name, theirs)]
    for key in table:
        if key not in known:
            raise Refusal(f"{where}.{key}: rope_type {name!r} has no such key{nearest(key, known)}")
    ours: Table = {"kind": name} | {NAMES[key]: value for key, value in table.items()}
    if name == "proportional":
        if share == 0:
            return NoRotary()
        ours["pairs"] = 1.0 if share is None else share
    elif share not in {None, 1}:
        ours["share"] = share
    ours |= _for_length(name, table, config, where, length)
    spec = validate({"rotary": ours}, _Read, where).rotary
    assert not isinstance(spec, RotaryMap)
    return _for_latent(spec, on_all, where) if config.get("kv_lora_rank") else spec


def _is_passed_over(name: str, key: str) -> bool:
    """Whether transformers does not look at a key that the kind has here."""
    return name == "dynamic" and key == "original_max_position_embeddings"


def _completed(name: str, table: Table, config: Mapping[str, Any], where: str) -> Table:
    """The table with what transformers takes from elsewhere in the configuration, or leaves out."""
    if table.get("rope_theta") is None and config.get("rope_theta") is not None:
        table = {**table, "rope_theta": config["rope_theta"]}
    if table.get("rope_theta") is None:
        raise Refusal(f"{where}.rope_theta is missing; give the base, which is 10000.0 where nothing else was meant")
    longest = config.get("max_position_embeddings")
    if name in {"yarn", "llama3", "longrope"}:
        original = config.get("original_max_position_embeddings")
        original = original or table.get("original_max_position_embeddings") or longest
        if original is None:
            raise Refusal(f"{where}.original_max_position_embeddings is missing, and so is max_position_embeddings")
        table = {**table, "original_max_position_embeddings": original}
        if "factor" not in table and name != "llama3" and longest is not None:
            # Phi-3 and DeepSeek-V3 leave it to be worked out.
            table["factor"] = max(1.0, longest / original)
    if name == "yarn":
        has_both = table.get("mscale") and table.get("mscale_all_dim") and "attention_factor" not in table
        ignored = set() if has_both else {"mscale", "mscale_all_dim"}
        # Either beta may be 0 for "the usual".
        ignored |= {key for key in ("beta_fast", "beta_slow") if not table.get(key, True)}
        table = {key: value for key, value in table.items() if key not in ignored}
    return table


def _for_length(name: str, table: Table, config: Mapping[str, Any], where: str, length: int | None) -> Table:
    """What the kinds that depend on a length say here in place of looking at each text."""
    if name not in {"dynamic", "longrope"}:
        return {}
    longest = config.get("max_position_embeddings")
    if longest is None:
        raise Refusal(f"{where}: rope_type {name!r} needs max_position_embeddings, which is missing")
    length = length or longest
    if name == "dynamic":
        return {"original_length": longest, "length": length}
    return {"use": "long" if length > table["original_max_position_embeddings"] else "short"}


def _for_latent(spec: RotarySpec, mscale_all_dim: float, where: str) -> RotarySpec:
    """For ours, which has one factor for all of a score: theirs is mscale_all_dim's part, beside cos and sin's own."""
    if not isinstance(spec, YarnRotary | LongRotary):
        return spec
    on_cos_and_sin = yarn_factor(spec) if isinstance(spec, YarnRotary) else longrope_factor(spec)
    on_scores = sharpening(spec.factor, mscale_all_dim)
    if abs(on_cos_and_sin - 1) > 1e-9:
        raise Refusal(
            f"{where}: it scales the rotated part of latent attention's scores by {on_cos_and_sin:.6g}^2 more than the "
            "rest, and ours scales both alike; that is so where mscale equals mscale_all_dim"
        )
    usual = isinstance(spec, YarnRotary) and on_scores == sharpening(spec.factor)
    changes = {"mscale": None, "mscale_all_dim": None} if isinstance(spec, YarnRotary) else {}
    return spec.model_copy(update={**changes, "attention_factor": None if usual else on_scores})


def to_huggingface(rotary: AnyRotary, channels: int, *, is_latent: bool = False, version: int = 5) -> Table:
    """The keys of a `config.json` that say the same: transformers then computes what we do, at every length.

    What has no name there, or changes with a text's length there (ntk, dynamic, yarn by rotations, one list of
    longrope), is written as another type of the same frequencies; read again it is that type.

    channels: of a head, all that may be turned. is_latent: for latent attention. version: 5, or 4 for files that older
    readers understand. Raises Refusal where version 4 has no words for it.
    """
    specs = by_view(rotary)
    tables = {name: _write(specs[view], channels, is_latent=is_latent) for name, view in VIEWS.items()}  # type: ignore[index]
    flat = tables["full_attention"]
    if specs["full"] == specs["window"]:
        return {"rope_parameters": flat} if version == 5 else _as_version_4(flat)
    if version != 5:
        raise Refusal("a rotation for each kind of layer has no place in rope_scaling; write version 5's configuration")
    truncates = {table.get("truncate", True) for table in tables.values() if table["rope_type"] == "yarn"}
    if len(truncates) > 1:
        raise Refusal("transformers reads one `truncate` for all layer types; give full and window layers the same")
    return {"rope_parameters": {**tables, **({"truncate": False} if truncates == {False} else {})}}


def _write(spec: RotarySpec, channels: int, *, is_latent: bool) -> Table:
    share = getattr(spec, "share", None)
    table = _write_turned(spec, turned_channels(spec, channels), is_latent=is_latent)
    return table if share is None else {**table, "partial_rotary_factor": share}


def _write_turned(spec: RotarySpec, turned: int, *, is_latent: bool) -> Table:
    if isinstance(spec, NoRotary):
        return {"rope_type": "proportional", "rope_theta": 10_000.0, "partial_rotary_factor": 0.0}
    if isinstance(spec, ProportionalRotary):
        return {**_named(spec, "proportional"), "partial_rotary_factor": spec.pairs}
    if isinstance(spec, NtkRotary | DynamicRotary):
        return {"rope_type": "default", "rope_theta": ntk_base(spec, turned)}
    if isinstance(spec, YarnRotary) and spec.ramp == "rotations":
        return _as_lists(spec, turned, yarn_factor(spec), is_latent=is_latent)
    if isinstance(spec, LongRotary):
        return _as_lists(spec, turned, longrope_factor(spec), is_latent=is_latent)
    if isinstance(spec, YarnRotary) and is_latent:
        plain = spec.model_copy(update={"attention_factor": None, "mscale": None, "mscale_all_dim": None})
        return {**_named(plain, "yarn"), **_mscales(spec)}
    return _named(spec, "default" if spec.kind == "abf" else spec.kind)


def _named(spec: RotarySpec, kind: str) -> Table:
    """Key by key; what is at its default in yarn and llama3 is said as well, because readers differ."""
    values = spec.model_dump(mode="json", exclude_none=True)
    table = {theirs: values[ours] for theirs, ours in NAMES.items() if ours in values}
    if table.get("truncate", False):
        del table["truncate"]
    return {"rope_type": kind, **table}


def _as_lists(spec: YarnRotary | LongRotary, turned: int, attention_factor: float, *, is_latent: bool) -> Table:
    """As longrope, whose lists can say any frequencies; both the same, since there a text's length chooses."""
    if is_latent and attention_factor != 1:
        raise Refusal(f"rotary kind {spec.kind!r} with an attention factor has no words for latent attention there")
    speeds_P, _ = FREQUENCIES[spec.kind](spec, turned)  # in fp64: `frequencies` has rounded them
    slower = (powers(spec.base, turned) / speeds_P).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": spec.base,
        "factor": spec.factor,
        "original_max_position_embeddings": spec.original_length,
        "short_factor": slower,
        "long_factor": slower,
        "attention_factor": attention_factor,
    }


def _mscales(spec: YarnRotary) -> Table:
    """Both mscales equal, so that the attention factor is on all of a score, as DeepSeek's files have it."""
    on_scores = yarn_factor(spec)
    if on_scores == 1:
        return {"attention_factor": 1.0}
    if spec.factor == 1:
        raise Refusal(f"attention_factor={on_scores} with factor=1 has no words for latent attention there; use 1.0")
    mscale = (on_scores - 1) / (0.1 * math.log(spec.factor))
    return {"mscale": mscale, "mscale_all_dim": mscale}


def _as_version_4(table: Table) -> Table:
    table = dict(table)
    if table["rope_type"] == "proportional":
        raise Refusal("a rotation of a part of the pairs has no name in rope_scaling; write version 5's configuration")
    outside: Table = {key: table.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in table}
    return {**outside, "rope_scaling": None if table == {"rope_type": "default"} else table}
