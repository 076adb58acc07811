"""Cases that were found once, by name: each loads or is refused as every other."""

from tests.fuzz.mutations import NAME, TINY, Case


def _tiny(*overrides: str, files: dict[str, bytes] | None = None, links: dict[str, str] | None = None) -> Case:
    """The smallest run with overrides, from a copy of it."""
    return Case("named", [NAME, *overrides], {NAME: TINY.read_bytes(), **(files or {})}, links or {}, list(overrides))


def _file(text: bytes, **files: bytes) -> Case:
    return Case("named", [NAME], {NAME: text, **{f"{name}.toml": content for name, content in files.items()}})


NAMED = {
    "arrays a hundred thousand deep": _file(b"x = " + b"[" * 100_000),
    "tables two thousand deep": _file(b"[" + b"a." * 2000 + b"a]\nx = 1\n"),
    "an override two thousand tables deep": _tiny(f"{'a.' * 2000}a=1"),
    "an override that opens a thousand arrays": _tiny(f"optimizer.clip={'[' * 1000}"),
    "an override of a second line": _tiny("optimizer.clip=1.0\nseed=3"),
    "an override as long as a file": _tiny(f"seed.deeper={'x' * 100_000}"),
    "a kind as long as a file": _tiny(f"optimizer.kind={'x' * 100_000}"),
    "a word as long as a file": _tiny(f"evals.needle.haystack={'x' * 100_000}"),
    "a key that colours the terminal": _file(TINY.read_bytes() + b'"\\u001b[31m" = 1\n'),
    "a key of a zero byte": _file(TINY.read_bytes() + b'"\\u0000" = 1\n'),
    "a parent that is a pipe": Case("named", [NAME], {NAME: b"extends = 'pipe'\n"}, {"pipe": "|"}),
    "a parent without an end": _file(b"extends = '/dev/zero'\n"),
    "a parent with a zero byte": _file(b'extends = "a\\u0000b"\n'),
    "a configuration that is a pipe": Case("named", ["pipe"], {}, {"pipe": "|"}),
    "a chain of 1500 parents": Case(
        "named", ["c0.toml"], {f"c{n}.toml": f"extends = 'c{n + 1}.toml'\n".encode() for n in range(1500)}
    ),
    "a source called like a key of another": _tiny("data.sources.needles={path='words.txt'}"),
    "a stage that is wrong inside": _tiny("context.stages.0.rotary.bass=1"),
    "ranks without number that hold a row": _tiny("parallel.context=65536"),
    "experts without number": _tiny("model.moe.expert_width=1000000000000000000"),
    "heads without number": _tiny(f"model.attention.num_heads={2**62}"),
    "layers without number": _tiny("model.num_layers=9999"),
    "threads without number": _tiny("threads=1099511627776"),
    "patience without end": _tiny("watchdog.seconds=1e30"),
    "a tokenizer that is not there": _tiny("data.tokenizer={kind='bpe', file='nowhere.json'}"),
    "a scale that divides nothing": _tiny(f"scale={2**53}"),
    "a word that is no UTF-8": _tiny("name=\udcff"),
}  # fmt: skip
