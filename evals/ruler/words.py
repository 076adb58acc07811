"""Words for keys and lists: our own short ones, or those of the wonderwords package that RULER takes.

Ours are 120 adjectives, 120 nouns and 80 verbs: 14,400 keys such as "amber-harbor" where wonderwords gives
millions, and 320 words to count where it gives thousands. A score with ours is no score of the published table.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Literal

from settings import Refusal

WordList = Literal["own", "wonderwords"]

ADJECTIVES = """
able amber ancient aware bitter blank blunt bold brave brief bright brisk broad bronze calm careful cheap chief civil
clean clever cold common cool coral crisp curious curly damp daring dark deep dense dim distant double dry dull dusty
eager early easy elder empty equal even exact faint fair famous fancy fast fierce final fine firm flat fond formal frank
free fresh full gentle giant glad golden grand grave green gray happy hard heavy hidden hollow honest huge humble icy
ideal idle inner ivory jolly keen kind large late lazy lean level light likely little lively local lonely long loud
loyal lucky major mellow mild minor modest narrow neat noble novel odd open pale plain polite proud quick quiet rapid
"""
NOUNS = """
acorn actor anchor apple apron arrow autumn badge bakery barrel basket beacon bell bench berry blanket bottle branch
bridge broom bucket button cabin candle canyon carpet castle cellar chair cherry chimney circle clock cloud coast comet
copper corner cotton cradle creek crown desert diary dinner donkey dragon drawer driver eagle engine falcon feather
fence ferry fiddle flame forest fountain garden ginger glacier glove goose grape guitar hammer harbor helmet hill
horizon house island jacket jungle kettle kitchen ladder lantern lemon letter library magnet maple marble market meadow
mirror monkey morning mountain needle nest ocean orange orchard otter oven paddle palace panda paper parrot pebble
pencil pepper piano pillow pirate planet pocket pond potato prairie puzzle rabbit raven ribbon river saddle
"""
VERBS = """
accept add admire agree allow answer appear argue arrive ask bake bathe become begin believe borrow breathe build call
carry catch chase choose climb collect compare cook count cover cross dance decide deliver describe dig draw dream drink
earn enter escape explain explore fetch fill find finish float fly follow forget gather give greet grow guess hear help
hide hope invite join jump keep knit knock laugh lead learn lend listen live mend mix move notice obey offer paint pass
"""


@dataclass(frozen=True)
class Words:
    """What keys and lists are made of."""

    keys: tuple[str, ...]
    """adjective-noun, sorted."""
    counted: tuple[str, ...]
    """Single words, sorted."""


@cache
def read_words(source: WordList) -> Words:
    """The words of one source. Raises Refusal where wonderwords is asked for and not installed."""
    adjectives, nouns, verbs = _own() if source == "own" else _wonderwords()
    keys = {f"{adjective}-{noun}" for adjective in adjectives for noun in nouns}
    return Words(tuple(sorted(keys)), tuple(sorted({*adjectives, *nouns, *verbs})))


def _own() -> tuple[list[str], list[str], list[str]]:
    return ADJECTIVES.split(), NOUNS.split(), VERBS.split()


def _wonderwords() -> tuple[list[str], list[str], list[str]]:
    try:
        reader = import_module("wonderwords.random_word")._get_words_from_text_file
    except ImportError:
        raise Refusal(
            'evals.ruler.words="wonderwords": the package is not installed; `pip install wonderwords`, or use "own"'
        ) from None
    return reader("adjectivelist.txt"), reader("nounlist.txt"), reader("verblist.txt")
