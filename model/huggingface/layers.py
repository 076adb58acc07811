"""What differs from layer to layer, in the ways that architectures write it down: windows, rotations, dense layers."""

from collections.abc import Sequence

from model.huggingface.aspects import Aspect, Config, given, refuse_others, stated
from model.huggingface.traits import Decoder
from settings import Refusal, Table

FULL, SLIDING = "full_attention", "sliding_attention"


def one_window(flag: str | None = None) -> Aspect:
    """All layers have the same window, or none has. flag: a key that has to be true for it."""

    def write(d: Decoder) -> Table:
        window = d.settings.window(0)
        return {"sliding_window": window} | ({flag: window is not None} if flag else {})

    def read(config: Config) -> Table:
        if flag is not None and not config.get(flag):
            return {}
        window = stated(config, "sliding_window")
        return {} if window is None else {"pattern": ["window"], "attention": {"window": window}}

    return Aspect(write, read)


def windows(*, flag: str | None = None, has_nope: bool = False) -> Aspect:
    """`layer_types` says which layers have the window; has_nope: `no_rope_layers` which are rotated (1) or not (0)."""

    def write(d: Decoder) -> Table:
        layers = range(d.settings.num_layers)
        window = d.settings.attention.window
        keys: Table = {
            "layer_types": [FULL if d.settings.window(layer) is None else SLIDING for layer in layers],
            "sliding_window": window,
        }
        if flag is not None:
            keys[flag] = window is not None
        if has_nope:
            keys["no_rope_layers"] = [int(d.rotation(layer) is not None) for layer in layers]
        return keys

    def read(config: Config) -> Table:
        num_layers = given(config, "num_hidden_layers")
        is_windowed = config.get(flag) if flag else config.get("sliding_window", "a number") is not None
        # Where there may be windows, each architecture has a rule of its own for files without the list.
        types = given(config, "layer_types") if is_windowed else config.get("layer_types") or [FULL] * num_layers
        rotated = _rotated(config, num_layers) if has_nope else [1] * num_layers
        if len(types) != num_layers or len(rotated) < num_layers or not {*types} <= {FULL, SLIDING}:
            raise Refusal(f"config.json: layer_types={types}: needs {num_layers} of {FULL!r} and {SLIDING!r}")
        window = config.get("sliding_window") if SLIDING in types else None
        if SLIDING in types and not (window and is_windowed):
            raise Refusal(f"config.json: layer_types names {SLIDING}, but sliding_window or {flag} says there is none")
        kinds = [
            ("window" if kind == SLIDING else "full") + ("" if turned else "_nope")
            for kind, turned in zip(types, rotated, strict=False)
        ]
        return {"pattern": shortest(kinds), "attention": {} if window is None else {"window": window}}

    return Aspect(write, read)


def _rotated(config: Config, num_layers: int) -> list[int]:
    """SmolLM3's list of layers with a rotation, or its rule: each fourth has none."""
    every = given(config, "no_rope_layer_interval", 4)
    return config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(num_layers)]


def shortest(kinds: Sequence[str]) -> list[str]:
    """The shortest pattern that, repeated and cut, gives these."""
    period = next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    return list(kinds[:period])


def _dense_first(count: int, config: Config) -> Table:
    return {"num_dense_layers": count, "feed_forward_width": given(config, "intermediate_size")} if count else {}


def dense_by_number() -> Aspect:
    """`first_k_dense_replace`: DeepSeek's way."""
    return Aspect(
        lambda d: {"first_k_dense_replace": _num_dense(d)},
        lambda config: _dense_first(
            min(given(config, "first_k_dense_replace"), given(config, "num_hidden_layers")), config
        ),
    )


def dense_by_list() -> Aspect:
    """`mlp_only_layers`: Qwen's way, who can have them anywhere."""

    def read(config: Config) -> Table:
        refuse_others(config, decoder_sparse_step=1)
        dense = sorted(given(config, "mlp_only_layers", []))
        if dense != list(range(len(dense))):
            raise Refusal(f"config.json: mlp_only_layers={dense}: dense layers can only be the first ones here")
        return _dense_first(len(dense), config)

    return Aspect(lambda d: {"mlp_only_layers": list(range(_num_dense(d))), "decoder_sparse_step": 1}, read)


def dense_by_type() -> Aspect:
    """`mlp_layer_types`: a word for each layer."""

    def write(d: Decoder) -> Table:
        dense = _num_dense(d)
        return {"mlp_layer_types": ["dense"] * dense + ["sparse"] * (d.settings.num_layers - dense)}

    def read(config: Config) -> Table:
        types = given(config, "mlp_layer_types", ["sparse"] * given(config, "num_hidden_layers"))
        dense = types.count("dense")
        if types != ["dense"] * dense + ["sparse"] * (given(config, "num_hidden_layers") - dense):
            raise Refusal(f"config.json: mlp_layer_types={types}: dense layers can only be the first ones here")
        return _dense_first(dense, config)

    return Aspect(write, read)


def _num_dense(d: Decoder) -> int:
    return d.settings.num_layers if d.settings.moe is None else d.settings.num_dense_layers
