"""Windows that lie inside one long document of held-out text, for tasks that ask what a far beginning is worth."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evals.scoring import Materials, Rows, sources_of
from evals.windows import documents_in, read, spread_inside
from settings import Refusal


def sources_with_long_documents(materials: Materials, names: Sequence[str], length: int, task: str) -> list[str]:
    """The sources to read: those named, which must all hold a document of more than `length` tokens, or every one
    that does. Raises Refusal, naming the task's keys, where that leaves none."""
    names_asked = sources_of(materials, names, f"evals.{task}.sources")
    longest = {name: longest_document(materials, name) for name in names_asked}
    fit = [name for name in names_asked if longest[name] > length]
    unfit = [name for name in names_asked if longest[name] <= length]
    if (names and unfit) or not fit:
        name = max(unfit, key=lambda source: longest[source])
        raise Refusal(
            f"evals.{task}.length={length} does not fit: the longest held-out document of source {name!r} has "
            f"{longest[name]} tokens; lower it to {max(longest[name] - 1, 1)} or less, or name another source"
        )
    return fit


def longest_document(materials: Materials, source: str) -> int:
    """Tokens in the longest held-out document of a source."""
    documents = documents_in(materials.held_out[source], materials.tokenizer.end_of_text)
    return max((document.stop - document.start for document in documents), default=0)


def long_windows(materials: Materials, source: str, length: int, tokens: int, seed: int) -> Rows:
    """Windows of `length`, about `tokens` tokens together, spread over the documents that are longer."""
    held_out, end_of_text = materials.held_out[source], materials.tokenizer.end_of_text
    starts: np.ndarray = spread_inside(documents_in(held_out, end_of_text), length, tokens, seed)
    # None of them holds the end of a document, and a row that is one document can be read in chunks.
    return replace(read(held_out, starts, length, end_of_text), end_of_text=None)
