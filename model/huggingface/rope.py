"""The rotation's place in a config.json: one for the model, or one for each type of layer."""

from context.huggingface import from_huggingface, to_huggingface
from context.rotary import AnyRotary
from model.huggingface.aspects import Aspect, Config
from model.huggingface.layers import FULL, SLIDING
from model.huggingface.traits import Decoder
from settings import Table


def one_rope(**defaults: object) -> Aspect:
    """`rope_parameters` for all layers. defaults: keys of the configuration that an architecture fills in itself."""

    def write(d: Decoder) -> Table:
        is_latent = d.settings.attention.kind == "latent"
        return to_huggingface(_used(d), d.settings.rotary_channels, is_latent=is_latent) | _unless_told(defaults, d)

    def read(config: Config) -> Table:
        return {"rotary": from_huggingface({**defaults, **config})}

    return Aspect(write, read)


def _unless_told(defaults: dict[str, object], d: Decoder) -> Table:
    """Such a key with the value that makes no difference, or an architecture's own would count."""
    shares = {"partial_rotary_factor": getattr(_used(d), "share", None) or 1.0}
    return {key: shares[key] for key in defaults}


def rope_by_type() -> Aspect:
    """`rope_parameters` with a table for each type of layer, also where they are equal."""

    def write(d: Decoder) -> Table:
        rotary = d.rotary if len(d.rotations) > 1 else _used(d)
        tables = to_huggingface(rotary, d.settings.rotary_channels)["rope_parameters"]
        if FULL in tables:
            return {"rope_parameters": tables}
        # transformers reads `truncate` beside the types, not within.
        inside = {key: value for key, value in tables.items() if key != "truncate"}
        outside = {"truncate": tables["truncate"]} if "truncate" in tables else {}
        return {"rope_parameters": {FULL: inside, SLIDING: dict(inside), **outside}}

    return Aspect(write, lambda config: {"rotary": from_huggingface(config)})


def _used(d: Decoder) -> AnyRotary:
    return d.rotations[0] if d.rotations else d.rotary
