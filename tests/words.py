"""A text to train on that any folder can have: fifty words in random order."""

import random
from pathlib import Path


def write_words(folder: Path) -> None:
    """words.txt, forty paragraphs of 300 words; always the same."""
    words = random.Random(0)
    stock = ["".join(words.choice("abcdefghij") for _ in range(words.randint(2, 7))) for _ in range(50)]
    paragraphs = [" ".join(words.choice(stock) for _ in range(300)) for _ in range(40)]
    (folder / "words.txt").write_text("\n\n".join(paragraphs))
