"""Models that transformers made and wrote are read as what they are, or refused by name."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.huggingface.architectures import decoder_of
from model.huggingface.convert import read_folder
from model.initialize import initialize
from model.transformer import build_model
from settings import Refusal

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCAB, LENGTH = 97, 40
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
MOE = {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2}
ALONE = {"n_routed_experts": 6, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
LATENT = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
MSCALED = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}

# What transformers makes of its own defaults, but for size; then what it makes of other settings.
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama tied, with llama3": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
            },
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral without a window": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "qwen3": ("Qwen3", {"head_dim": 10, "rope_parameters": YARN}),
    "qwen3 with windows": ("Qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "smollm3": ("SmolLM3", {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "no_rope_layer_interval": 2}),
    "smollm3 with windows": (
        "SmolLM3",
        {"pad_token_id": 0, "use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [1, 0, 1]},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 6}),
    "qwen3_moe": ("Qwen3Moe", MOE),
    "qwen3_moe, dense first": ("Qwen3Moe", {**MOE, "mlp_only_layers": [0], "norm_topk_prob": True, "head_dim": 10}),
    "qwen3_moe, all dense": ("Qwen3Moe", {**MOE, "mlp_only_layers": [0, 1, 2]}),
    "qwen3_moe with windows": ("Qwen3Moe", {**MOE, "use_sliding_window": True, "sliding_window": 7}),
    "mellum": (
        "Mellum",
        {**MOE, "sliding_window": 7, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "mellum, extended as OLMo 3": (
        "Mellum",
        {
            **MOE, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": {
                "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "qwen2_moe": ("Qwen2Moe", {**MOE, "qkv_bias": False, "shared_expert_intermediate_size": 24}),
    "glm4_moe": ("Glm4Moe", {**ALONE, "first_k_dense_replace": 1}),
    "glm4_moe with norms": (
        "Glm4Moe", {**ALONE, "use_qk_norm": True, "partial_rotary_factor": 1.0, "rope_parameters": YARN},
    ),
    "dots1": ("Dots1", {**ALONE, "n_shared_experts": 2, "sliding_window": 7, "max_window_layers": 2}),
    "deepseek_v3": ("DeepseekV3", {**ALONE, **LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 4}),
    "deepseek_v3 without a query rank": (
        "DeepseekV3",
        {
            **ALONE, **LATENT, "q_lora_rank": None, "num_key_value_heads": 4, "rope_parameters": MSCALED,
            "n_shared_experts": 2,
        },
    ),
}  # fmt: skip


def make(name: str, out: Path) -> torch.nn.Module:
    """A model of theirs with random weights, norms and biases that show, in a folder that it wrote."""
    kind, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in tensor_name:
                tensor.uniform_(0.5, 1.5)
            if "e_score_correction_bias" in tensor_name:
                tensor.uniform_(-0.3, 0.3)
    model.save_pretrained(out)
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder to be copied and broken."""
    out = tmp_path_factory.mktemp("llama") / "llama"
    make("llama", out)
    return out


@pytest.fixture
def copy(llama, tmp_path):
    """The folder again, and ways to change what is in it."""

    class Copy:
        folder = tmp_path / "copy"

        def config(self, **changes):
            path = self.folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
            return self.folder

        def tensors(self, change):
            path = self.folder / "model.safetensors"
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
            return self.folder

    Copy.folder.mkdir()
    for path in llama.iterdir():
        (Copy.folder / path.name).write_bytes(path.read_bytes())
    return Copy()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_their_logits_are_ours(name, tmp_path):
    theirs = make(name, tmp_path / "theirs")
    imported = read_folder(tmp_path / "theirs")
    ours = build_model(imported.decoder.settings, VOCAB)
    initialize(ours, 3, "cpu")
    ours.load_state_dict(imported.weights)
    ours.use_rotary(imported.decoder.rotary)
    tokens_BT = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens_BT).logits
    found = ours.eval()(tokens_BT)[0] @ ours.head_weight.T
    assert found.std() > 0.3
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, found.abs().max())
    assert imported.length == 64


def refused(folder: Path, match: str) -> None:
    with pytest.raises(Refusal, match=match):
        read_folder(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["LlamaForCausalM"]}, r"\['LlamaForCausalM'\].*did you mean 'LlamaForCausalLM'"),
        ({"architectures": None}, r"architectures=\[\]: not one of those that can be read"),
        ({"architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"]}, "not one of those that can be read"),
        ({"hidden_size": None}, "config.json: has no hidden_size"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': this decoder is only hidden_act='silu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: weights of low precision"),
        ({"num_key_value_heads": 3}, "model.attention.num_kv_heads|num_kv_heads=3 must divide num_heads=4"),
        ({"rope_parameters": {"rope_type": "yearn", "rope_theta": 1e4}}, "unknown rope_type 'yearn'"),
        ({"partial_rotary_factor": 0.5}, "a rotary with a share of channels: transformers' LlamaForCausalLM would"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 9.0}, "sliding_attention": {"rope_theta": 8.0}}}, None),
    ],
)
def test_a_configuration_that_we_are_not_is_refused(copy, changes, match):
    if match is None:
        # A rotation for layers that are not there is none: that of the layers that are counts.
        assert read_folder(copy.config(**changes)).decoder.rotary.base == 9.0
    else:
        refused(copy.config(**changes), match)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, r"mlp_only_layers=\[2\]: dense layers can only be the first"),
        ("mellum", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "dense layers can only be the first"),
        ("mellum", {"sliding_window": None}, "names sliding_attention, but sliding_window or"),
        ("mellum", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("mellum", {"layer_types": ["full_attention"]}, "needs 3 of 'full_attention'"),
        ("qwen2_moe", {"qkv_bias": True}, "qkv_bias is not false"),
        ("qwen2_moe", {"qkv_bias": None}, "qkv_bias is not false"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 25}, "a multiple of moe_intermediate_size=12"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("deepseek_v3", {"has_selection_bias": False}, "there is no selection bias, but .* is not 0"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, "latent attention"),
    ],
)
def test_an_architectures_own_settings_are_refused(name, changes, match, tmp_path):
    make(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(tmp_path, match)


def test_tensors_that_are_not_the_configurations_are_refused_by_name(copy):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.norm.weight"] = torch.ones(31)

    with pytest.raises(Refusal) as refusal:
        read_folder(copy.tensors(change))
    lines = str(refusal.value).splitlines()[1:]
    assert sorted(lines) == [
        "  model.layers.0.self_attn.q_proj.bias: (32,) in the files, missing by config.json",
        "  model.layers.1.mlp.up_proj.weight: missing in the files, (40, 32) by config.json",
        "  model.norm.weight: (31,) in the files, (32,) by config.json",
    ]


def test_what_predicts_nothing_is_left_behind_and_said(copy):
    before = read_folder(copy.folder).weights

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.3.mlp.gate_proj.weight"] = torch.ones(4, 4)

    copy.tensors(change)
    refused(copy.folder, "the files have 4 layers, but config.json says num_hidden_layers=3")
    said: list[str] = []
    after = read_folder(copy.config(num_nextn_predict_layers=1), said.append).weights
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert len(said) == 1 and "rotary_emb.inv_freq" in said[0] and "model.layers.3.mlp" in said[0]


def test_a_head_that_is_tied_is_the_embedding(copy):
    folder = copy.config(tie_word_embeddings=True)
    refused(folder, "says tie_word_embeddings, but lm_head.weight is not the embedding")
    copy.tensors(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert "head.weight" not in read_folder(folder).weights


def test_low_precision_is_refused_and_half_is_read(copy):
    copy.tensors(lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    assert read_folder(copy.folder).weights["norm.weight"].dtype == torch.float32
    copy.tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    refused(copy.folder, "model.norm.weight is I8; only floats are read")


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_code_of_a_folder_is_run(copy, tmp_path):
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w')"
    for name in ("modeling_llama.py", "configuration_llama.py", "tokenization_llama.py"):
        (copy.folder / name).write_text(code)
    copy.config(auto_map={"AutoConfig": "configuration_llama.X", "AutoModelForCausalLM": "modeling_llama.X"})
    (copy.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    read_folder(copy.folder)
    (copy.folder / "model.safetensors").unlink()
    refused(copy.folder, "holds only pytorch_model.bin, and reading a pickle can run code")
    (copy.folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    refused(copy.folder, "model.safetensors: is not a whole safetensors file")
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (copy.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy.folder, "names 'pytorch_model.bin', which is no safetensors file of this folder")
    assert not trace.exists()
    pickle.loads((copy.folder / "pytorch_model.bin").read_bytes())
    assert trace.exists(), "the bomb works"


def test_folders_that_are_not_whole_are_refused(copy, tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder")
    index = copy.folder / "model.safetensors.index.json"
    for file, match in (
        ("../model.safetensors", "no safetensors file of this folder"),
        ("a.safetensors", "a.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        refused(copy.folder, match)
    index.write_text(json.dumps({"weight_map": {"model.norms.weight": "model.safetensors"}}))
    refused(copy.folder, "names tensors that are not where it says: model.norms.weight")
    index.write_text("[]")
    refused(copy.folder, "is no JSON object")
    index.write_text("{}")
    refused(copy.folder, "has no weight_map")
    index.unlink()
    whole = (copy.folder / "model.safetensors").read_bytes()
    (copy.folder / "model.safetensors").write_bytes(whole[:-100])
    refused(copy.folder, "is not a whole safetensors file")
    (copy.folder / "model.safetensors").unlink()
    refused(copy.folder, "holds no weights; give a folder with model.safetensors")
    (copy.folder / "config.json").write_text("{")
    refused(copy.folder, "config.json: cannot be read")
    (copy.folder / "config.json").unlink()
    refused(copy.folder, "config.json: no such file")


OTHERWISE = {"rope_parameters": "rope_theta", "num_local_experts": "num_experts"}
"""What a refusal calls a key that is missing under one of its names."""


@pytest.mark.parametrize("name", MODELS)
def test_a_key_that_is_left_out_means_what_it_means_to_transformers(name, tmp_path):
    """Whatever key is missing: what we read is what we read of the configuration that transformers completes."""
    kind, changes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes}, architectures=[f"{kind}ForCausalLM"])
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    read = 0
    for key in whole.keys() - {"model_type"}:
        shorter = {other: value for other, value in whole.items() if other != key}
        path.write_text(json.dumps(shorter))
        try:
            _, ours = decoder_of(shorter)
        except Refusal as refusal:
            assert key in str(refusal) or OTHERWISE[key] in str(refusal), (key, refusal)
            continue
        completed = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        assert ours == decoder_of(completed)[1], key
        read += 1
    assert read > 10
