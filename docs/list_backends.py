"""Writes the table of backends in docs/attention.md from their own records: `python -m docs.list_backends`."""

from pathlib import Path

from attention.contract import PLAIN_FACTS, Backend, plain
from attention.core import AUTO, BACKENDS, summary

FILE = Path(__file__).with_name("attention.md")
BEGIN, END = "<!-- backends: python -m docs.list_backends -->\n", "<!-- end of backends -->\n"
SHORT = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
LABELS = {
    "window": "window",
    "documents": "documents",
    "unequal_lengths": "T != S",
    "offset": "tile of a larger mask",
    "key_documents": "documents with other keys",
    "prefix": "prefix",
    "first_tokens": "first tokens",
    "softcap": "softcap",
    "value_channels": "values of another width",
    "partial": "fp32 answers to bf16",
    "lse_gradient": "gradient of the log-sum-exp",
}


def main() -> None:
    FILE.write_text(renewed(FILE.read_text()))


def renewed(text: str) -> str:
    """The page with its table as the backends have it now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def table() -> str:
    """A column for each backend, a row for each thing that one may or may not do."""
    backends = list(BACKENDS.values())
    rows = [["", *(f"`{backend.name}`" for backend in backends)], ["---"] * (len(backends) + 1)]
    for device, order in AUTO.items():
        rows.append([f"auto on {device}", *(str(order.index(name) + 1) if name in order else "" for name in BACKENDS)])
    rows.append(["devices", *(", ".join(backend.capability.devices) for backend in backends)])
    rows.append(["dtypes", *(_dtypes(backend) for backend in backends)])
    rows.append(["channels", *(_channels(backend) for backend in backends)])
    for key in PLAIN_FACTS:
        rows.append([LABELS[key], *(_mark(getattr(backend.capability, key)) for backend in backends)])
    rows.append(["backward pass", *(_mark(backend.capability.trainable) for backend in backends)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    descriptions = [f"- `{backend.name}`: {summary(backend)}." for backend in backends]
    return "\n".join([*lines, "", *descriptions, ""])


def _dtypes(backend: Backend) -> str:
    return " ".join(SHORT[plain(dtype)] for dtype in backend.capability.dtypes)


def _channels(backend: Backend) -> str:
    most = backend.capability.max_channels
    return "any" if most is None else f"to {most}"


def _mark(can: bool) -> str:
    return "yes" if can else "-"


if __name__ == "__main__":
    main()
