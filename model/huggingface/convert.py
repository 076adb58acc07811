"""A decoder's weights into a Hugging Face folder, and out of one, with everything checked before anything is read."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import AnyTokenizerSettings
from model.huggingface.architectures import choose, config_of, decoder_of
from model.huggingface.aspects import Config, given
from model.huggingface.files import SHARD_BYTES, Weights, naming, read_config, write_weights, written_beside
from model.huggingface.tensors import Layout, layout_of
from model.huggingface.tokenizer import tokenizer_files
from model.huggingface.traits import Decoder, without_unused
from model.transformer import build_model
from settings import Refusal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TABLES = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""What old files have besides weights: tables that follow from the configuration."""
LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Origin:
    """What a model was trained with, which its weights alone do not tell."""

    length: int
    """The sequence length it was trained at."""
    tokenizer: AnyTokenizerSettings
    end_of_text: int


def export(  # noqa: PLR0917 (what, whence, whereto, and how)
    decoder: Decoder, weights: Mapping[str, Tensor], origin: Origin, out: Path, dtype: str, most: int = SHARD_BYTES
) -> str:
    """Write a folder that `from_pretrained` of transformers' AutoModelForCausalLM and AutoTokenizer takes.

    weights: as of `Transformer.state_dict`. Returns the architecture's name. Raises Refusal, with nothing written,
    naming what no architecture holds.
    """
    decoder = without_unused(decoder)
    architecture = choose(decoder)
    config = config_of(decoder, len(weights["embedding.weight"]), origin.length, origin.end_of_text)
    texts = tokenizer_files(origin.tokenizer, origin.length)
    texts["config.json"] = json.dumps({**config, "dtype": dtype}, indent=2) + "\n"
    layout = layout_of(architecture, decoder.settings)
    with written_beside(out) as folder:
        write_weights(folder, layout.export(weights), DTYPES[dtype], most)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return architecture.name


@dataclass(frozen=True)
class Imported:
    """What a Hugging Face folder holds, as ours."""

    folder: Path
    decoder: Decoder
    weights: dict[str, Tensor]
    """As `Transformer.load_state_dict` takes them: fp32, on the CPU."""
    config: Config
    length: int


def read_folder(folder: Path, say: Callable[[str], None] = lambda line: None) -> Imported:
    """Read a folder of config.json and safetensors; no code of it is run, whatever it names.

    say: is told what is left behind. Raises Refusal naming an architecture, a setting, or tensors that are missing, too
    many or of another shape.
    """
    config = read_config(folder)
    with naming(folder):
        architecture, decoder = decoder_of(config)
        vocab_size, length = given(config, "vocab_size"), given(config, "max_position_embeddings")
    files = Weights(folder)
    _refuse_other_depth(config, files)
    layout = layout_of(architecture, decoder.settings)
    ours = build_model(decoder.settings, vocab_size).state_dict()
    left = _left_behind(decoder, files)
    if left:
        say(f"left behind, as nothing here uses it: {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}")
    _refuse_other_tensors(folder, layout, ours, {name: files.shapes[name] for name in files.shapes if name not in left})
    weights = {part.ours: part.join(files.read, ours[part.ours]) for part in layout.parts}
    strange = [name for name in layout.zeros if files.read(name).count_nonzero()]
    if strange:
        raise Refusal(f"{folder}: config.json says that there is no selection bias, but {strange[0]} is not 0")
    return Imported(folder, decoder, weights, config, length)


def _refuse_other_depth(config: Config, files: Weights) -> None:
    """Refuse layers that are too few or too many, before a model of so many is made.

    Of those past the last only the ones that look more than a token ahead may be there.
    """
    depth, ahead = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    found = 1 + max((layer for name in files.shapes if (layer := _layer(name)) is not None), default=-1)
    if not depth <= found <= depth + ahead:
        raise Refusal(
            f"{files.folder}: the files have {found} layers, but config.json says num_hidden_layers={depth} and"
            f" num_nextn_predict_layers={ahead}; mend config.json, or give the folder that these files belong to"
        )


def _layer(name: str) -> int | None:
    found = LAYER.match(name)
    return None if found is None else int(found[1])


def _left_behind(decoder: Decoder, files: Weights) -> list[str]:
    """Tensors that their model does not use to predict the next token: tables, a second copy, more tokens ahead."""
    names = [name for name in files.shapes if TABLES.fullmatch(name)]
    if decoder.settings.tied_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= files.shapes.keys():
        if not torch.equal(files.read("lm_head.weight"), files.read("model.embed_tokens.weight")):
            raise Refusal(
                f"{files.folder}: config.json says tie_word_embeddings, but lm_head.weight is not the embedding"
            )
        names.append("lm_head.weight")
    return names + [name for name in files.shapes if (_layer(name) or 0) >= decoder.settings.num_layers]


def _refuse_other_tensors(
    folder: Path, layout: Layout, ours: Mapping[str, Tensor], found: Mapping[str, torch.Size]
) -> None:
    """Refuse files whose tensors are not those of the configuration, by name."""
    wanted = {name: piece.shape for part in layout.parts for name, piece in part.cut(ours[part.ours])}
    wanted |= layout.zeros
    names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if names:
        lines = [f"  {n}: {_shape(found.get(n))} in the files, {_shape(wanted.get(n))} by config.json" for n in names]
        more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise Refusal(f"{folder}: the files are not of this config.json:\n" + "\n".join(lines[:10] + more))


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
