"""Experts, routers and shared experts, in the ways that architectures write them down."""

from model.huggingface.aspects import Aspect, Config, given, refuse_others
from model.huggingface.traits import Decoder, groups_of, normalizes
from moe.layer import MoESettings
from settings import Refusal, Table

NO_BIAS = "has_selection_bias"
"""Our own key: the architecture has a bias in any case, a model of ours without one has zeros there."""


def experts(
    *,
    count: str,
    width: str,
    kind: str = "softmax",
    normalize: str | None = "norm_topk_prob",
    by_default: bool = False,
) -> Aspect:
    """A router and its experts. normalize: the key for gates that sum to 1, None: they always do.

    by_default: what the key means where it is left out.
    """

    def write(d: Decoder) -> Table:
        moe = d.settings.moe
        if moe is None:
            return {"intermediate_size": d.settings.feed_forward_width}
        keys: Table = {count: moe.num_experts, "num_experts_per_tok": moe.experts_per_token}
        keys["intermediate_size"] = d.settings.feed_forward_width or moe.expert_width
        if normalize is not None:
            keys[normalize] = normalizes(moe)
        return keys | {width: moe.expert_width}

    def read(config: Config) -> Table:
        if all_dense(config):
            return {}
        # Files of the same architecture have one name or the other, by the version that wrote them.
        names = (count, "num_experts", "num_local_experts", "n_routed_experts")
        found = next((config[name] for name in names if config.get(name) is not None), None)
        router = {"kind": kind, "normalize": normalize is None or given(config, normalize, by_default)}
        moe = {"experts_per_token": given(config, "num_experts_per_tok"), "expert_width": given(config, width)}
        return {"moe": {"num_experts": found or given(config, count), "router": router, **moe}}

    return Aspect(write, read)


def scored_alone() -> Aspect:
    """DeepSeek-V3's router: sigmoids, a selection bias, groups of experts, scaled gates, shared experts."""

    def write(d: Decoder) -> Table:
        moe = d.settings.moe
        if moe is None:
            return {"num_nextn_predict_layers": 0}
        groups = groups_of(moe)
        return {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": groups.count if groups else 1,
            "topk_group": groups.keep if groups else 1,
            "routed_scaling_factor": moe.router.scale,
            "n_shared_experts": moe.num_shared_experts,
            "num_nextn_predict_layers": 0,
            NO_BIAS: moe.has_bias,
        }

    def read(config: Config) -> Table:
        if all_dense(config):
            return {}
        refuse_others(config, scoring_func="sigmoid", topk_method="noaux_tc")
        router: Table = {"scale": float(given(config, "routed_scaling_factor"))}
        if given(config, "n_group") > 1:
            router["groups"] = {"count": config["n_group"], "keep": given(config, "topk_group")}
        moe: Table = {"router": router, "num_shared_experts": given(config, "n_shared_experts")}
        if given(config, NO_BIAS, True):
            moe["balance"] = [{"kind": "bias"}]
        return {"moe": moe}

    return Aspect(write, read)


def gated_shared() -> Aspect:
    """Qwen2-MoE's shared experts, one wide one with a gate of its own."""

    def write(d: Decoder) -> Table:
        moe = _moe(d)
        return {"shared_expert_intermediate_size": moe.num_shared_experts * moe.expert_width, "qkv_bias": False}

    def read(config: Config) -> Table:
        if config.get("qkv_bias") is not False:
            raise Refusal("config.json: qkv_bias is not false: projections have no bias here")
        shared, width = given(config, "shared_expert_intermediate_size"), given(config, "moe_intermediate_size")
        if shared % width or not shared:
            raise Refusal(
                f"config.json: shared_expert_intermediate_size={shared}: shared experts are as wide as the others here,"
                f" so a multiple of moe_intermediate_size={width}"
            )
        return {"moe": {"num_shared_experts": shared // width, "shared_gate": True}}

    return Aspect(write, read)


def all_dense(config: Config) -> bool:
    """Whether an architecture of experts has a dense layer everywhere: what it says of experts then means nothing."""
    types = config.get("mlp_layer_types")
    if types is not None:
        return "sparse" not in types
    if config.get("mlp_only_layers"):
        return len(config["mlp_only_layers"]) >= given(config, "num_hidden_layers")
    return given(config, "first_k_dense_replace", 0) >= given(config, "num_hidden_layers")


def _moe(d: Decoder) -> MoESettings:
    assert d.settings.moe is not None, "an architecture of experts was chosen for a dense model"
    return d.settings.moe
