"""A training step, on CPU or GPU, against transformers' Llama and Mixtral of the same shape in the same process.

Width 256, 4 layers, 8 experts top-2, 8 x 512 tokens, AdamW, clipping. The rivals take turns, so that a change in the
machine's load hits all of them; the ratio of the medians is the result. MFU counts the same model FLOPs for both
(see docs/planning.md); rows are whole, without padding.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from attention.attention import AttentionSettings
from attention.mask import Documents, Mask
from benchmarks.record import keep
from context.rotary import DefaultRotary
from model.initialize import initialize
from model.loss import cross_entropy
from model.size import flops_per_token
from model.transformer import ModelSettings, build_model
from moe.balance import balance_objective
from moe.layer import MoESettings
from moe.words import routing_in_words
from run.peak import peak_of
from run.speed import utilization

WIDTH, LAYERS, HEADS, KV_HEADS, VOCAB, ROWS, LENGTH = 256, 4, 4, 2, 512, 8, 512
DENSE_WIDTH, EXPERT_WIDTH, EXPERTS, PER_TOKEN = 1024, 512, 8, 2

Step = Callable[[], float]
"""One whole optimizer step; returns its loss, so that nobody can skip the work."""


MOE = MoESettings(num_experts=EXPERTS, experts_per_token=PER_TOKEN, expert_width=EXPERT_WIDTH)


def shape(kind: str) -> ModelSettings:
    return ModelSettings(
        num_layers=LAYERS,
        width=WIDTH,
        feed_forward_width=DENSE_WIDTH if kind == "dense" else None,
        attention=AttentionSettings(num_heads=HEADS, num_kv_heads=KV_HEADS),
        moe=MOE if kind == "moe" else None,
    )


def ours(kind: str, tokens_BT: torch.Tensor, precision: torch.dtype) -> Step:
    device, settings = tokens_BT.device, shape(kind)
    model = build_model(settings, VOCAB)
    initialize(model, 0, device)
    model.use_rotary(DefaultRotary(base=10_000.0))
    labels_BT = torch.cat([tokens_BT[:, 1:], torch.full((ROWS, 1), -100, device=device)], dim=1)
    weights_BT = torch.ones(labels_BT.shape, device=device)
    mask = Mask(documents=Documents((LENGTH,) * ROWS))

    def loss() -> torch.Tensor:
        hidden_BTD, stats = model(tokens_BT, None, mask)
        hidden_ND, labels_N, weights_N = hidden_BTD.flatten(0, 1), labels_BT.flatten(), weights_BT.flatten()
        sums = cross_entropy(hidden_ND, model.head_weight, labels_N, weights_N, 4096)
        return sums.weighted / (ROWS * (LENGTH - 1)) + (balance_objective(stats, MOE) if stats else 0.0)

    return stepper(model, loss, precision, device)


def theirs(kind: str, tokens_BT: torch.Tensor, precision: torch.dtype) -> Step:
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    if kind == "dense":
        model: nn.Module = LlamaForCausalLM(LlamaConfig(intermediate_size=DENSE_WIDTH, **shape))
    else:
        experts: dict[str, Any] = {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": PER_TOKEN,
            "output_router_logits": True,
        }
        model = MixtralForCausalLM(MixtralConfig(intermediate_size=EXPERT_WIDTH, **experts, **shape))
    model.to(tokens_BT.device)
    return stepper(model, lambda: model(input_ids=tokens_BT, labels=tokens_BT).loss, precision, tokens_BT.device)


def stepper(model: nn.Module, loss: Callable[[], torch.Tensor], precision: torch.dtype, device: torch.device) -> Step:
    """Both rivals get the same optimizer, clipping and autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model.train()

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def measure(kind: str, precision: torch.dtype, rounds: int, device: str) -> dict[str, Any]:
    tokens_BT = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    rivals = {"ours": ours(kind, tokens_BT, precision), "transformers": theirs(kind, tokens_BT, precision)}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, step in rivals.items():
            begin = time.perf_counter()
            step()
            if turn > 0:  # the first turn fills caches
                seconds[name].append(time.perf_counter() - begin)
    speed = {name: ROWS * LENGTH / statistics.median(times) for name, times in seconds.items()}
    peak, flops = peak_of(torch.device(device), precision), flops_per_token(shape(kind), VOCAB, LENGTH)
    mfu = {name: utilization(each, flops, peak.flops, 1) for name, each in speed.items()}
    return {
        "model": kind,
        "device": device,
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ours_tokens_per_second": round(speed["ours"]),
        "transformers_tokens_per_second": round(speed["transformers"]),
        "ratio": round(speed["ours"] / speed["transformers"], 2),
        "ours_mfu": mfu["ours"],
        "transformers_mfu": mfu["transformers"],
        "flops_per_token": flops,
        **peak.facts,
        "routing": routing_in_words(shape(kind).moe),
        "padding_share": 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/step.json")
    arguments = parser.parse_args()
    rows = []
    for precision in arguments.precision:
        for kind in ("dense", "moe"):
            rows.append(measure(kind, getattr(torch, precision), arguments.rounds, arguments.device))
            print(rows[-1], flush=True)
    if arguments.keep:
        print(keep("step", rows))


if __name__ == "__main__":
    main()
