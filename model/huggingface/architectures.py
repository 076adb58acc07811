"""The architectures of transformers that our decoder can be exactly; from settings to config.json and back."""

from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple

from model.huggingface import layers, mixtures
from model.huggingface.aspects import Aspect, Config, decoder, dense, given, grouped, latent
from model.huggingface.rope import one_rope, rope_by_type
from model.huggingface.traits import TRAITS, Decoder, traits_of
from model.transformer import ModelSettings
from settings import Refusal, Table, merge, nearest, validate


class Architecture(NamedTuple):
    """One class of transformers: what a model must have to be one, what it may have besides, and its keys."""

    name: str
    model_type: str
    needs: frozenset[str]
    holds: frozenset[str]
    aspects: tuple[Aspect, ...]
    rope: Aspect
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    mlp: str = "mlp"

    def lacks(self, traits: Iterable[str]) -> list[str]:
        """The traits that it has no place for."""
        return [trait for trait in traits if trait not in self.needs | self.holds]


ONE_ROPE = one_rope()


def architecture(
    name: str, model_type: str, needs: str, holds: str, *aspects: Aspect, rope: Aspect = ONE_ROPE
) -> Architecture:
    """A row of the table below, in which names of traits stand side by side."""
    return Architecture(name, model_type, frozenset(needs.split()), frozenset(holds.split()), aspects, rope)


def scored_alone(*, normalizes: bool) -> tuple[Aspect, Aspect]:
    """DeepSeek-V3's experts; normalizes: whether gates sum to 1 where a file does not say so."""
    names = mixtures.experts(
        count="n_routed_experts", width="moe_intermediate_size", kind="sigmoid", by_default=normalizes
    )
    return names, mixtures.scored_alone()


QWEN_EXPERTS = mixtures.experts(count="num_experts", width="moe_intermediate_size")
ALONE = "sigmoid raw_gates scaled_gates bias groups shared dense_first"

# The first that fits is taken: plain ones first, which most programs read.
ARCHITECTURES = (
    architecture("LlamaForCausalLM", "llama", "", "", decoder(), grouped(is_grouped=False), dense()),
    architecture(
        "MistralForCausalLM", "mistral", "", "window uneven_heads", decoder(), grouped(), dense(), layers.one_window()
    ),
    architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        "head_norms",
        "window some_windows uneven_heads",
        decoder(),
        grouped(head_norms=True, channels=128),
        dense(),
        layers.windows(flag="use_sliding_window"),
    ),
    architecture(
        "SmolLM3ForCausalLM",
        "smollm3",
        "",
        "nope window some_windows uneven_heads",
        decoder(is_tied=True),
        grouped(),
        dense(),
        layers.windows(flag="use_sliding_window", has_nope=True),
    ),
    architecture(
        "MixtralForCausalLM",
        "mixtral",
        "experts",
        "window uneven_heads",
        decoder(),
        grouped(),
        mixtures.experts(count="num_local_experts", width="intermediate_size", normalize=None),
        layers.one_window(),
    )._replace(expert_names=("w1", "w3", "w2"), mlp="block_sparse_moe"),
    architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        "experts head_norms",
        "window raw_gates dense_first uneven_heads",
        decoder(),
        grouped(head_norms=True),
        QWEN_EXPERTS,
        layers.dense_by_list(),
        layers.one_window(flag="use_sliding_window"),
    ),
    architecture(
        "MellumForCausalLM",
        "mellum",
        "head_norms",
        "experts window some_windows two_rotations raw_gates dense_first uneven_heads",
        decoder(),
        grouped(head_norms=True, channels=128),
        mixtures.experts(count="num_experts", width="moe_intermediate_size", by_default=True),
        layers.dense_by_type(),
        layers.windows(),
        rope=rope_by_type(),
    ),
    architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        "experts gated_shared",
        "window some_windows raw_gates dense_first uneven_heads",
        decoder(),
        grouped(),
        QWEN_EXPERTS,
        mixtures.gated_shared(),
        layers.dense_by_list(),
        layers.windows(flag="use_sliding_window"),
    ),
    architecture(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        "experts sigmoid",
        f"head_norms uneven_heads partial {ALONE}",
        decoder(),
        grouped(head_norms="use_qk_norm"),
        *scored_alone(normalizes=True),
        layers.dense_by_number(),
        rope=one_rope(partial_rotary_factor=0.5),
    ),
    architecture(
        "Dots1ForCausalLM",
        "dots1",
        "experts sigmoid head_norms",
        f"window some_windows uneven_heads {ALONE}",
        decoder(),
        grouped(head_norms=True),
        *scored_alone(normalizes=False),
        layers.dense_by_number(),
        layers.windows(),
    ),
    architecture(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        "latent",
        f"experts uneven_heads {ALONE}",
        decoder(),
        latent(),
        *scored_alone(normalizes=True),
        layers.dense_by_number(),
    ),
)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def choose(d: Decoder) -> Architecture:
    """The architecture that is this decoder exactly; raises Refusal naming what no architecture holds."""
    traits = traits_of(d)
    found = next((one for one in ARCHITECTURES if one.needs <= traits and not one.lacks(traits)), None)
    if found is None:
        raise Refusal(
            f"no architecture of transformers is this model: {'; '.join(_nearly(d, traits))}. It can be evaluated as it"
            " is: python -m evals.harness RUN TASKS"
        )
    return found


def _nearly(d: Decoder, traits: frozenset[str]) -> list[str]:
    """What would make it one: for up to three architectures, those with the fewest changes."""
    changes = {one: (sorted(one.lacks(traits)), sorted(one.needs - traits)) for one in ARCHITECTURES}
    fewest = min(len(without) + len(needed) for without, needed in changes.values())
    ways: dict[str, str] = {}
    for one, (without, needed) in changes.items():
        if len(without) + len(needed) == fewest:
            parts = ["without " + ", ".join(TRAITS[trait].words(d) for trait in without)] if without else []
            parts += ["with " + ", ".join(TRAITS[trait].words(d) for trait in needed)] if needed else []
            ways.setdefault(" and ".join(parts), one.name)
    return [f"{way} it would be {name}" for way, name in ways.items()][:3]


def config_of(d: Decoder, vocab_size: int, length: int, end_of_text: int) -> Table:
    """config.json of a decoder that was trained at `length`; raises Refusal as `choose` does."""
    chosen = choose(d)
    head = {"architectures": [chosen.name], "model_type": chosen.model_type, "dtype": "float32"}
    tokens = {"vocab_size": vocab_size, "eos_token_id": end_of_text, "bos_token_id": None, "pad_token_id": None}
    keys = _merged(aspect.write(d) for aspect in chosen.aspects)
    return {**head, **tokens, "max_position_embeddings": length, **keys, **chosen.rope.write(d), "use_cache": True}


def decoder_of(config: Config) -> tuple[Architecture, Decoder]:
    """The architecture that a config.json names and the decoder that it is.

    config: as `read_config` gives it. Raises Refusal naming an architecture that is not in the table, or a key with a
    value that we have no place for.
    """
    named = given(config, "architectures", [])
    if len(named) != 1 or named[0] not in BY_NAME:
        known = nearest(named[0] if len(named) == 1 else "", list(BY_NAME))
        raise Refusal(f"config.json: architectures={named}: not one of those that can be read{known}")
    chosen = BY_NAME[named[0]]
    if config.get("model_type", chosen.model_type) != chosen.model_type:
        raise Refusal(
            f"config.json: model_type={config['model_type']!r}, but architectures={named} is {chosen.model_type!r};"
            " transformers goes by the type: mend the one that is wrong"
        )
    table = _merged(aspect.read(config) for aspect in chosen.aspects)
    if "moe" not in table:
        table.pop("num_dense_layers", None)
    settings = validate(table, ModelSettings, "config.json")
    d = Decoder(settings, chosen.rope.read(config)["rotary"])
    strange = chosen.lacks(traits_of(d))
    if strange:
        raise Refusal(
            f"config.json: {TRAITS[strange[0]].words(d)}: transformers' {chosen.name} would pass that over; remove it"
        )
    # A rotation for layers that are not there says nothing.
    return chosen, Decoder(settings, d.rotations[0]) if len(d.rotations) == 1 else d


def _merged(tables: Iterable[Table]) -> Table:
    return reduce(merge, tables, dict[str, Any]())
