"""A mixture said in documents, as the mixture of tokens that it amounts to."""

from collections.abc import Mapping
from typing import Literal

MixtureUnit = Literal["tokens", "documents"]


def shares_of_tokens(shares_of_documents: Mapping[str, float], mean_lengths: Mapping[str, float]) -> dict[str, float]:
    """Shares of tokens that sum to 1; mean_lengths: tokens of a document on average, of each source that is named.

    Raises ValueError where a source that has a share has no documents to have a mean length of.
    """
    empty = [name for name, share in shares_of_documents.items() if share > 0 and not mean_lengths[name] > 0]
    if empty:
        raise ValueError(f"mixture.{empty[0]}: the source has no documents; leave it out or say the mixture in tokens")
    tokens = {name: share * mean_lengths[name] for name, share in shares_of_documents.items()}
    total = sum(tokens.values())
    return {name: count / total for name, count in tokens.items()}
