"""Our own words: as many as stated, each once, and none that would make two keys alike."""

from evals.ruler import words
from evals.ruler.words import read_words


def test_as_many_as_stated_and_each_once() -> None:
    lists = [text.split() for text in (words.ADJECTIVES, words.NOUNS, words.VERBS)]
    assert [len(one) for one in lists] == [120, 120, 80]
    own = read_words("own")
    assert len(own.counted) == len(set(own.counted)) == 320 and len(own.keys) == len(set(own.keys)) == 14_400
    assert "14,400" in words.__doc__ and "320 words" in words.__doc__
    assert all(word.isascii() and word.isalpha() and word.islower() for word in own.counted)
    assert list(own.counted) == sorted(own.counted) and list(own.keys) == sorted(own.keys)


def test_the_package_that_ruler_takes(monkeypatch) -> None:
    """A stand-in for wonderwords: its private reader of lists is what RULER calls."""
    from types import SimpleNamespace

    lists = {"adjectivelist.txt": ["red", "big"], "nounlist.txt": ["dog", "red"], "verblist.txt": ["run"]}
    stand_in = SimpleNamespace(_get_words_from_text_file=lists.__getitem__)
    monkeypatch.setattr(words, "import_module", lambda name: stand_in)
    found = read_words.__wrapped__("wonderwords")
    assert found.keys == ("big-dog", "big-red", "red-dog", "red-red") and found.counted == ("big", "dog", "red", "run")
