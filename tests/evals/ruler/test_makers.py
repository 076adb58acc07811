"""What every sample promises, over drawn samples: it fits, it is filled, and its question has one right answer."""

import re
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from data.tokenizer import train_bpe
from evals.ruler.counting import FrequentWords
from evals.ruler.series import Series
from evals.ruler.tasks import RULER_TASKS
from evals.ruler.templates import NOISE
from evals.ruler.tracking import EXAMPLE_TOKENS
from settings import Refusal

LENGTHS = {"cwe": 2048, "vt": 2304}


def length_of(name: str) -> int:
    """Long enough for every task in bytes."""
    return LENGTHS.get(name, 1536)


@pytest.fixture(scope="session")
def bpe(given, tmp_path_factory):
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    prompts = [task.template.text for task in RULER_TASKS.values()]
    return train_bpe([NOISE, *prompts, " ".join(given.essay), " ".join(given.words.keys[::50])], 800, file)


@pytest.fixture(params=["byte", "bpe"])
def either(request, given, bpe):
    """The ingredients with each tokenizer of ours."""
    return given if request.param == "byte" else replace(given, tokenizer=bpe)


def texts(one: Series, count: int) -> list[tuple[str, tuple[str, ...]]]:
    """(prompt, references) of so many questions."""
    decode = one.given.tokenizer.decode
    return [(decode(question.prompt), question.references) for question in one.questions(count)]


def series(given, name: str, seed: int = 42, length: int | None = None) -> Series:
    return Series(name, length or length_of(name), seed, given)


@pytest.mark.parametrize("name", RULER_TASKS)
def test_a_sample_fills_its_length_and_no_unit_more_would_fit(name: str, either) -> None:
    one = series(either, name)
    for number, question in enumerate(one.questions(2)):
        size = one.fill(number, guess=50)
        assert one.make(number, size).size == question.size <= one.length == question.length
        assert one.make(number, size + 1).size > one.length
        text = either.tokenizer.decode(question.answer)
        assert all(reference in text for reference in question.references[: 1 if name.startswith("qa") else None])


@pytest.mark.parametrize("name", RULER_TASKS)
def test_a_sample_is_a_function_of_its_place_alone(name: str, given) -> None:
    many, one = series(given, name).questions(2), series(given, name).questions(1)
    assert many[0].prompt.tolist() == one[0].prompt.tolist() != many[1].prompt.tolist()
    if not name.startswith("qa"):
        other = series(given, name, seed=43).questions(1)
        assert other[0].references != one[0].references
        longer = series(given, name, length=length_of(name) + 500).questions(1)
        assert longer[0].references != one[0].references


@pytest.mark.parametrize("name", [name for name in RULER_TASKS if name.startswith("niah")])
def test_needles_are_all_there_and_what_is_asked_stands_once(name: str, given) -> None:
    for prompt, references in texts(series(given, name), 6):
        context, asked = prompt.rsplit("\n", 1)
        found = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", context)
        keys = re.split(r", and |, ", re.search(r"for (.*?) mentioned", asked)[1])
        assert {value for key, value in found if key in keys} == set(references)
        assert len(set(references)) == len(references) == (4 if name in ("niah_multivalue", "niah_multiquery") else 1)
        assert len(found) >= {"niah_multikey_1": 4}.get(name, len(references))
    if name in ("niah_multikey_2", "niah_multikey_3"):
        assert len(found) > 5, "the haystack is needles"


def test_what_is_asked_lies_anywhere_and_several_values_in_their_order(given) -> None:
    for name, is_ordered in (("niah_multiquery", False), ("niah_multivalue", True)):
        orders, places = Counter(), set()
        for prompt, references in texts(series(given, name), 12):
            at = [prompt.index(f"is: {reference}.") for reference in references]
            orders[tuple(sorted(range(4), key=at.__getitem__))] += 1
            places |= {round(place / len(prompt), 1) for place in at}
        assert (list(orders) == [(0, 1, 2, 3)]) is is_ordered and len(places) > 5
        assert is_ordered or len(orders) > 4


def test_chains_are_solved_by_following_them(given) -> None:
    for prompt, references in texts(series(given, "vt"), 6):
        example, question = prompt.split("\n\nMemorize", 1)
        for text, names in ((example, tuple(example.split()[-5:])), (question, references)):
            value = re.search(r"assigned the value (\d{5}) in", text)[1]
            holds = set(re.findall(rf"VAR ([A-Z]+) = {value}\b", text))
            for name, other in re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+) ", text):
                holds |= {name} if other in holds else set()
            assert holds == set(names) and len(names) == 5
            assert text.rstrip().endswith(" ".join(names)) or text.endswith("they are: ")
        assert all(len(name) == 5 for name in references)


def test_a_chain_is_asked_as_its_example_is_answered(given) -> None:
    sample = series(given, "vt").maker.make(Random(1), 0, 5)
    example = sample.prompt.partition("\n\nMemorize")[0]
    blanks = len(sample.answer) - len(sample.answer.lstrip())
    assert re.search(rf"they are: {' ' * blanks}[A-Z]+( [A-Z]+){{4}}$", example)
    assert sample.prompt.endswith("they are: ") and sample.answer.split() == list(sample.references)


def test_the_solved_example_keeps_within_its_tokens_where_it_can(given, bpe) -> None:
    """In bytes even the smallest example takes more, and is taken all the same."""
    few = series(replace(given, tokenizer=bpe), "vt", length=2048)
    prompt = texts(few, 1)[0][0]
    example = prompt[: prompt.index("\n\nMemorize")]
    assert EXAMPLE_TOKENS - 40 < len(bpe.encode(example)) <= EXAMPLE_TOKENS + 15
    assert series(given, "vt").maker.example_size == 5


def test_the_ten_words_are_more_common_than_any_other(given) -> None:
    for prompt, references in texts(series(given, "cwe"), 4):
        listed = re.findall(r"\d+\. (\S+)", prompt.rsplit("\n", 2)[1])
        counts = Counter(listed)
        assert {counts[word] for word in references} == {6} and len(references) == 10
        assert {count for word, count in counts.items() if word not in references} == {1}
        assert len({listed.index(word) for word in references}) == 10


def test_the_three_coded_words_come_next_to_the_dots_and_never_tie(given) -> None:
    for length in (1024, 1536, 2048, 4096):
        for prompt, references in texts(series(given, "fwe", length=length), 3):
            text = prompt.split("coded words. ", 1)[1].split("\n")[0].split(" ")
            (dots, _), *ranked = Counter(text).most_common(5)
            counts = [count for _, count in ranked]
            assert dots == "..." and [word for word, _ in ranked[:3]] == list(references)
            assert counts[0] > counts[1] > counts[2] > counts[3]


def test_coded_words_never_tie_from_the_smallest_size_on_and_grow_with_the_length() -> None:
    for size in range(FrequentWords(1024).smallest, 400):
        sample = FrequentWords(1024).make(Random(size), 0, size)
        counts = Counter(sample.prompt.split("coded words. ", 1)[1].split("\n")[0].split(" "))
        (_, most), *ranked = counts.most_common(5)
        assert most > ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]
        assert tuple(word for word, _ in ranked[:3]) == sample.references
    for length, words in ((200, 5), (1024, 20), (1099, 21)):
        prompt = FrequentWords(length).make(Random(0), 0, 20_000).prompt
        assert len(set(prompt.split("coded words. ", 1)[1].split("\n")[0].split(" "))) == words


def test_words_stand_elsewhere_in_every_sample(given) -> None:
    for name in ("cwe", "fwe"):
        places = {
            tuple(prompt.index(f" {reference}", len(prompt) // 2) for reference in references[:3])
            for prompt, references in texts(series(given, name, length=2048), 4)
        }
        assert len(places) == 4


def test_the_gold_document_is_among_them_in_any_place(given) -> None:
    places = set()
    for seed in range(12):
        [(prompt, references)] = texts(series(given, "qa_1", seed=seed, length=800), 1)
        documents = re.findall(r"Document (\d+):\n(.+)", prompt)
        assert [int(place) for place, _ in documents] == list(range(1, len(documents) + 1))
        assert {text for _, text in documents} >= {"The fox lives in a den.", "The owl lives in a tree."}
        places.add(next(int(place) for place, text in documents if references[0] in text))
    assert len(places) > 1


def test_no_document_stands_twice_as_long_as_there_are_others(given) -> None:
    for size in (1, 2, 3, 4):
        for seed in range(8):
            prompt = RULER_TASKS["qa_1"].maker(given, 2048).make(Random(seed), 0, size).prompt
            documents = re.findall(r"Document \d+:\n(.+)", prompt)
            assert len(documents) == len(set(documents)) == size
    prompt = RULER_TASKS["qa_1"].maker(given, 2048).make(Random(0), 0, 7).prompt
    assert sorted(Counter(re.findall(r"Document \d+:\n(.+)", prompt)).values()) == [1, 2, 2, 2]


def test_what_cannot_be_answered_or_made_to_fit_is_refused_by_name(given, tiny) -> None:
    with pytest.raises(Refusal, match=r"evals.ruler.lengths=512 does not fit: the smallest prompts of cwe take"):
        series(given, "cwe", length=512).questions(1)
    with pytest.raises(Refusal, match=r"evals.ruler: qa_1 cannot be asked: sample 3 has no question: the file has 2"):
        series(given, "qa_1").questions(3)
    with pytest.raises(Refusal, match="sample 3"):
        series(given, "qa_1").check(3)
    assert series(given, "niah_multiquery", length=900).check(2) is None


@pytest.mark.parametrize("name", ["niah_single_1", "vt", "cwe", "qa_1"])
def test_the_length_that_a_refusal_names_is_about_enough(given, name: str) -> None:
    """About: samples of another length are drawn anew."""
    with pytest.raises(
        Refusal, match=rf"evals.ruler.lengths=200 does not fit: .* of {name} .*use \d+ or more"
    ) as refusal:
        series(given, name, length=200).check(2)
    least = int(re.findall(r"use (\d+)", str(refusal.value))[0])
    series(given, name, length=least + 20).check(2)
    with pytest.raises(Refusal):
        series(given, name, length=least - 100).check(2)
    assert "Who owns" not in str(given.squad), "a question without an answer is left out"


def test_too_few_words_to_count_are_followed_by_keys(tiny) -> None:
    keys = tuple(f"k-{number}" for number in range(90))
    maker = RULER_TASKS["cwe"].maker(replace(tiny, words=replace(tiny.words, keys=keys)), 512)
    assert maker.largest == 90
    assert {word[0] for word in maker.make(Random(0), 0, 25).references} == {"w"}
    assert {word[0] for word in maker.make(Random(0), 0, 26).references} == {"k"}
