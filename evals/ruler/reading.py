"""Questions about documents: the paragraphs that answer one among others that do not.

Source: NVIDIA/RULER, scripts/data/synthetic/qa.py. Files are those of SQuAD 2.0 (dev-v2.0.json) and of HotpotQA
(hotpot_dev_distractor_v1.json), or of the same form; neither is part of this project. Mended: documents are shuffled by
the sample's own generator, where RULER's fixed seed gives the right one the same place in all samples of a size.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from evals.ruler.fill import UNBOUNDED, Sample
from evals.ruler.templates import DOCUMENT, READING
from settings import Refusal


@dataclass(frozen=True)
class Riddle:
    """One question of a file; documents by their numbers."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    """Documents that answer it."""
    related: tuple[int, ...] = ()
    """Documents that stand in before any other: paragraphs of the same article."""


@dataclass(frozen=True)
class Library:
    """Documents, different from each other, and questions about them."""

    documents: tuple[str, ...]
    riddles: tuple[Riddle, ...]


@dataclass(frozen=True)
class Reading:
    """A maker: sizes are documents; sample n asks the file's question n."""

    library: Library
    smallest: int = 1
    largest: int = UNBOUNDED

    def make(self, random: Random, number: int, size: int) -> Sample:
        """See Maker. Never fewer documents than those that answer the question."""
        if number >= len(self.library.riddles):
            raise Refusal(f"sample {number + 1} has no question: the file has {len(self.library.riddles)}")
        riddle = self.library.riddles[number]
        chosen = self._choose(random, riddle, max(size, len(riddle.gold)))
        random.shuffle(chosen)
        documents = [DOCUMENT.format(i=place, document=text) for place, text in enumerate(chosen, start=1)]
        prompt = READING.fill(context="\n\n".join(documents), query=riddle.query)
        return Sample(prompt, " " + riddle.answers[0], riddle.answers)

    def _choose(self, random: Random, riddle: Riddle, count: int) -> list[str]:
        """The gold documents, then related ones, then any; beyond all there are, all of them again."""
        documents = self.library.documents
        if count >= len(documents):
            return [documents[index % len(documents)] for index in range(count)]
        missing = count - len(riddle.gold)
        if missing <= len(riddle.related):
            numbers = [*riddle.gold, *random.sample(riddle.related, missing)]
        else:
            taken = {*riddle.gold, *riddle.related}
            others = [index for index in range(len(documents)) if index not in taken]
            numbers = [*riddle.gold, *riddle.related, *random.sample(others, missing - len(riddle.related))]
        return [documents[index] for index in numbers]


def read_squad(path: Path) -> Library:
    """{"data": [{"paragraphs": [{"context", "qas": [{"question", "is_impossible", "answers": [{"text"}]}]}]}]}; what
    cannot be answered is left out."""
    return _read(path, "evals.ruler.squad", _squad)


def read_hotpotqa(path: Path) -> Library:
    """[{"question", "answer", "context": [[title, [sentence, ...]], ...]}, ...]."""
    return _read(path, "evals.ruler.hotpotqa", _hotpotqa)


def _squad(data: Any) -> Library:
    articles = [article["paragraphs"] for article in data["data"]]
    documents, number_of = _numbered(paragraph["context"] for article in articles for paragraph in article)
    riddles = []
    for article in articles:
        of_article = [number_of[paragraph["context"]] for paragraph in article]
        for paragraph, own in zip(article, of_article, strict=True):
            related = tuple(number for number in of_article if number != own)
            riddles += [
                Riddle(entry["question"], tuple(answer["text"] for answer in entry["answers"]), (own,), related)
                for entry in paragraph["qas"]
                if not entry["is_impossible"]
            ]
    return Library(documents, tuple(riddles))


def _hotpotqa(data: Any) -> Library:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in data]
    documents, number_of = _numbered(text for of_entry in texts for text in of_entry)
    riddles = [
        Riddle(entry["question"], (entry["answer"],), tuple(number_of[text] for text in of_entry))
        for entry, of_entry in zip(data, texts, strict=True)
    ]
    return Library(documents, tuple(riddles))


def _numbered(texts: Iterator[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    documents = tuple(sorted(set(texts)))
    return documents, {text: number for number, text in enumerate(documents)}


def _read(path: Path, key: str, parse: Callable[[Any], Library]) -> Library:
    try:
        library = parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{key}={str(path)!r}: not a file of that form ({error!r}); see evals/ruler/reading.py") from None
    if not library.riddles or not all(riddle.answers and riddle.gold for riddle in library.riddles):
        raise Refusal(f"{key}={str(path)!r}: has a question without answer or document, or none; give another file")
    return library
