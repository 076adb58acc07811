"""`python -m data`: prepare shards, say how long their documents are, verify them, train a tokenizer."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.corpus import Documents, local_python, text_documents
from data.prepare import HELD_OUT_SHARE, prepare_or_reuse
from data.prepared import SPLITS, Manifest, read_manifest, verify
from data.shards import Shard
from data.tokenizer import BpeSettings, ByteSettings, build_tokenizer, train_bpe
from run.start import refusing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one message for what the user can mend, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    return refusing(lambda: command(options))


def prepare_command(options: argparse.Namespace) -> None:
    tokenizer = build_tokenizer(
        ByteSettings() if options.tokenizer == "byte" else BpeSettings(file=options.tokenizer),
    )
    began = time.perf_counter()
    manifest, is_new = prepare_or_reuse(_documents(options.source), tokenizer, options.out, options.held_out)
    seconds = time.perf_counter() - began
    _describe(options.out, manifest)
    size = sum(split["bytes"] for split in manifest["splits"].values())
    print(f"  prepared at {size / 1e6 / seconds:.1f} MB/s" if is_new else "  was there already")


def train_tokenizer_command(options: argparse.Namespace) -> None:
    documents = _documents(options.source)

    def texts() -> Iterator[str]:
        left = options.max_bytes
        for document in documents:
            if left <= 0:
                return
            yield document.text[:left].decode("utf-8", errors="ignore")
            left -= len(document.text)

    tokenizer = train_bpe(texts(), options.vocab_size, options.out)
    print(f"{options.out}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint[:12]}")
    print(f'  use it with data.tokenizer = {{ kind = "bpe", file = "{options.out}" }}')


def verify_command(options: argparse.Namespace) -> None:
    _describe(options.folder, verify(options.folder))
    print("  every file is as it was prepared")


def lengths_command(options: argparse.Namespace) -> None:
    """How long the documents for training are: what buckets can be made of."""
    read_manifest(options.folder)
    lengths = Shard(options.folder / SPLITS[0]).lengths.astype("int64")
    tokens = int(lengths.sum())
    print(f"{options.folder}: {len(lengths):,} documents of {tokens / max(1, len(lengths)):,.0f} tokens on average")
    print("  tokens or more   documents   share of tokens")
    for power in range(int(lengths.max(initial=1)).bit_length()):
        long = lengths[lengths >= 1 << power]
        print(f"  {1 << power:>14,}  {len(long):>10,}  {long.sum() / max(1, tokens):>16.1%}")


def _describe(folder: Path, manifest: Manifest) -> None:
    print(f"{folder}: {manifest['source']}")
    for split in SPLITS:
        counts = manifest["splits"][split]
        print(f"  {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes")
    contained = ", ".join(f"{one['name']} ({one['share']:.0%})" for one in manifest["contained"])
    share = manifest["splits"]["held_out"]["contained_share"]
    print(f"  of the held-out text, {share:.1%} stands in training too, in runs of 13 words and more")
    print(
        f"  dropped: {manifest['duplicates']} duplicates; held-out documents too like training: {contained or 'none'}"
    )


def _documents(source: str) -> Documents:
    return local_python() if source == "local_python" else text_documents(source)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    source = 'a .txt, .md, .jsonl(.gz) or .parquet file, a folder of them, or "local_python"'

    one = commands.add_parser("prepare", help="text into shards with a manifest")
    one.add_argument("source", metavar="SOURCE", help=source)
    one.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    one.add_argument("--tokenizer", default="byte", metavar="byte|FILE", help="byte, or a file of train-tokenizer")
    one.add_argument("--held-out", type=float, default=HELD_OUT_SHARE, metavar="SHARE", help="share kept from training")
    one.set_defaults(command=prepare_command)

    one = commands.add_parser("train-tokenizer", help="byte-level BPE from text")
    one.add_argument("source", metavar="SOURCE", help=source)
    one.add_argument("out", metavar="OUT", type=Path, help="file to write")
    one.add_argument("--vocab-size", type=int, required=True, metavar="N", help="bytes, merges and the end of text")
    one.add_argument("--max-bytes", type=int, default=64 << 20, metavar="N", help="text to learn from (default 64 MiB)")
    one.set_defaults(command=train_tokenizer_command)

    one = commands.add_parser("lengths", help="how long the documents are, to choose buckets by")
    one.add_argument("folder", metavar="FOLDER", type=Path)
    one.set_defaults(command=lengths_command)

    one = commands.add_parser("verify", help="read a prepared folder whole and compare every digest")
    one.add_argument("folder", metavar="FOLDER", type=Path)
    one.set_defaults(command=verify_command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
