"""The first weights of a run: drawn, or another run's, whose dense layers may become experts."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checkpoint.checkpoints import read_checkpoint
from checkpoint.fit import check_same, check_weights
from checkpoint.identity import read_recorded
from checkpoint.manifest import Damaged
from checkpoint.records import place_of, read_materials
from checkpoint.sealed import Tensors
from checkpoint.tensor_file import outline_of
from data.tokenizer import Tokenizer, build_tokenizer
from model.initialize import first_values
from model.transformer import Transformer, build_model
from moe.upcycle import UpcycleSettings, upcycle
from parallel.whole import fill
from settings import Refusal, Section, differences

if TYPE_CHECKING:
    from run.config import RunConfig
    from run.start import Run


class InitialSettings(Section):
    """Another run's weights to begin with; tokens, optimizer and schedule start anew."""

    checkpoint: str
    """A run's folder or one of its checkpoints: read once, when this run starts, and not needed afterwards."""
    upcycle: UpcycleSettings | None = None
    """How dense layers of that run become MoE layers of this one; left out: every layer stays what it is."""


def first_weights(run: "Run", model: Transformer, tokenizer: Tokenizer) -> None:
    """Give this rank's parts their first values: drawn, or those of the run to start from, in the terminal by name.

    A run that has a checkpoint of its own, or begins with a branch's, has no need of the other's. Every rank reads for
    itself. Raises Refusal, naming tensors, where the other run's shapes, vocabulary or heads differ.
    """
    config = run.config
    has_begun = config.branch is not None or any((run.folder / "checkpoints").glob("step_*"))
    given = {} if config.initial is None or has_begun else _given(config.initial, run, tokenizer)

    def value_of(name: str, shape: torch.Size) -> torch.Tensor:
        return given[name] if name in given else first_values(name, shape, config.model, config.seed)

    fill(model, run.device, run.mesh, run.layouts, value_of)


def _given(initial: InitialSettings, run: "Run", tokenizer: Tokenizer) -> Tensors:
    """The whole tensors that come from the other run, as they are or made of its dense layers."""
    config = run.config
    try:
        state, config_toml, weights = read_checkpoint(initial.checkpoint, run.say)
    except Refusal as refusal:
        raise Refusal(f"initial.checkpoint={initial.checkpoint}: {refusal}") from None
    step, _ = place_of(state, initial.checkpoint)
    theirs = read_recorded(config_toml, type(config), f"{initial.checkpoint}: config.toml")
    notes = _refuse_other_meaning(initial.checkpoint, theirs, config, tokenizer)
    check_weights(initial.checkpoint, weights, build_model(theirs.model, tokenizer.vocab_size))
    targets = {
        name: torch.empty(layout.shape, dtype=layout.dtype, device="meta") for name, layout in run.layouts.items()
    }
    dense = {
        layer: f"blocks.{layer}.feed_forward."
        for layer in range(config.model.num_layers)
        if config.model.feed_forward_kind(layer) == "moe" and f"blocks.{layer}.feed_forward.down.weight" in weights
    }
    _refuse_other_kinds(initial, dense)
    kept = _outside(weights, dense)
    saved, ours = ({n: outline_of(t) for n, t in side.items()} for side in (kept, _outside(targets, dense)))
    another = f"initial.checkpoint={initial.checkpoint}: is of another model"
    check_same(another, saved, ours, "make model.* fit, or leave it out")
    all_made = {layer: _upcycled(config, prefix, weights, targets) for layer, prefix in dense.items()}
    run.say(f"starts from {initial.checkpoint}, step {step}: {len(kept)} tensors as they are")
    for note in notes:
        run.say(f"  otherwise than there: {note}")
    for layer, prefix in dense.items():
        made = all_made[layer]
        fresh = {name.removeprefix(prefix) for name in targets if name.startswith(prefix)} - made.keys()
        run.say(f"  layer {layer}, dense there: upcycled {', '.join(made)}; drawn {', '.join(sorted(fresh)) or '-'}")
    return kept | {dense[layer] + name: tensor for layer, made in all_made.items() for name, tensor in made.items()}


def _upcycled(config: "RunConfig", prefix: str, weights: Tensors, targets: Tensors) -> Tensors:
    """The MoE layer's tensors that come from the dense one; what is drawn depends on the seed and the layer alone."""
    assert config.initial is not None and config.initial.upcycle is not None and config.model.moe is not None
    router = prefix + "router.weight"
    digest = hashlib.sha256(f"{config.seed} upcycle {prefix}".encode()).digest()
    return upcycle(
        config.initial.upcycle,
        config.model.moe,
        weights[prefix + "gate_up.weight"],
        weights[prefix + "down.weight"],
        first_values(router, targets[router].shape, config.model, config.seed),
        generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1),
    )


def _outside(tensors: Tensors, layers: dict[int, str]) -> Tensors:
    """The tensors of everything but those layers."""
    prefixes = tuple(layers.values())
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def _refuse_other_meaning(where: str, theirs: "RunConfig", config: "RunConfig", tokenizer: Tokenizer) -> list[str]:
    """Refuse tensors that would fit and mean something else; returns what is only used in another way, a line each."""
    heads = theirs.model.attention.num_heads
    if heads != config.model.attention.num_heads:
        raise Refusal(
            f"initial.checkpoint={where}: has model.attention.num_heads={heads}, this configuration"
            f" {config.model.attention.num_heads}; set them equal"
        )
    if _tokenizer_of(Path(where), theirs) != tokenizer.fingerprint:
        raise Refusal(
            f"initial.checkpoint={where}: was trained with another tokenizer (there {theirs.data.tokenizer}, here"
            f" {config.data.tokenizer}), so its vocabulary means something else; use that run's data.tokenizer"
        )
    if (theirs.model.moe is None) != (config.model.moe is None):
        return []
    return [f"model.{line}" for line in differences(theirs.model, config.model)]


def _tokenizer_of(path: Path, config: "RunConfig") -> str:
    """The fingerprint that a run wrote down; of a checkpoint alone, that of the tokenizer its configuration names."""
    for folder in (path, *path.resolve().parents[:2]):
        try:
            materials = read_materials(folder)
        except Damaged:
            continue
        if "tokenizer" in materials:
            return materials["tokenizer"]
    return build_tokenizer(config.data.tokenizer).fingerprint


def _refuse_other_kinds(initial: InitialSettings, dense: dict[int, str]) -> None:
    """Refuse dense layers that nothing says how to upcycle, and a way to upcycle without such layers."""
    if dense and initial.upcycle is None:
        raise Refusal(
            f"initial.checkpoint={initial.checkpoint}: is dense in layers {', '.join(map(str, dense))}, which are"
            ' MoE here; say how they become it: initial.upcycle = { kind = "copy" }'
        )
    if not dense and initial.upcycle is not None:
        raise Refusal(
            f"initial.upcycle: no layer is dense in {initial.checkpoint} and MoE here; leave it out to start from the"
            " weights as they are"
        )
