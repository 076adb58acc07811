"""What RULER's prompts are made from here: few words, a short essay, and two tiny files of questions."""

import json
from random import Random
from types import SimpleNamespace

import pytest

from data.tokenizer import ByteSettings, build_tokenizer
from evals.ruler.reading import read_hotpotqa, read_squad
from evals.ruler.tasks import Ingredients
from evals.ruler.words import Words, read_words

ESSAY = "One is here. Is two there? Three is gone! Four is back."

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "The fox lives in a den.",
                    "qas": [
                        {
                            "question": "Where does the fox live?",
                            "is_impossible": False,
                            "answers": [{"text": "a den"}, {"text": "in a den"}, {"text": "den"}],
                        },
                        {"question": "Who owns the den?", "is_impossible": True, "answers": []},
                    ],
                },
                {"context": "The owl lives in a tree.", "qas": []},
            ]
        },
        {
            "paragraphs": [
                {
                    "context": "Salt is white.",
                    "qas": [{"question": "What is white?", "is_impossible": False, "answers": [{"text": "Salt"}]}],
                },
                {"context": "Coal is black.", "qas": []},
            ]
        },
    ]
}
HOTPOTQA = [
    {
        "question": "In which land is the town of the bridge?",
        "answer": "Norland",
        "context": [["Bridge", ["The bridge is in Aby.", " It is old."]], ["Aby", ["Aby is a town in Norland."]]],
    },
    {"question": "Is the mill old?", "answer": "yes", "context": [["Mill", ["The mill is as old as the town."]]]},
]


class Scripted(Random):
    """Draws what it is told, so that a prompt can be written down by hand: words in turn, samples from the front (or at
    the given indices), and shuffles nothing."""

    def __init__(self, words=(), numbers=(), samples=()):
        super().__init__(0)
        self.words, self.numbers, self.samples = iter(words), iter(numbers), iter(samples)

    def choice(self, words):
        return next(self.words)

    def choices(self, letters, k):
        return list(next(self.words))

    def randint(self, low, high):
        number = next(self.numbers)
        assert low <= number <= high
        return number

    def randrange(self, low, high):
        return self.randint(low, high - 1)

    def getrandbits(self, bits):
        return next(self.numbers)

    def sample(self, items, k):
        indices = next(self.samples, None) or range(k)
        assert len(indices) == k
        return [items[index] for index in indices]

    def shuffle(self, items):
        pass


@pytest.fixture(scope="session")
def scripted():
    return Scripted


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "hotpotqa.json").write_text(json.dumps(HOTPOTQA))
    return SimpleNamespace(squad=folder / "squad.json", hotpotqa=folder / "hotpotqa.json", folder=folder)


@pytest.fixture(scope="session")
def tiny(files):
    """Ingredients that a prompt can be written by hand with."""
    counted = tuple(f"w{number:02}" for number in range(25))
    return Ingredients(
        tokenizer=build_tokenizer(ByteSettings()),
        words=Words(("a-b", "c-d"), counted),
        essay=tuple(ESSAY.split()),
        squad=read_squad(files.squad),
        hotpotqa=read_hotpotqa(files.hotpotqa),
    )


@pytest.fixture(scope="session")
def given(tiny):
    """Ingredients as a run would have them."""
    story = "It was a dark night. The wind blew hard! Who was there? Nobody knew, and nobody asked. " * 40
    return Ingredients(tiny.tokenizer, read_words("own"), tuple(story.split()), tiny.squad, tiny.hotpotqa)
