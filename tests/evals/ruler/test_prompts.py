"""One worked example a task: the whole prompt, written down by hand from RULER's own files."""

import pytest

from evals.ruler.tasks import RULER_TASKS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
UUIDS = ["00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"]
UUIDS += ["00000000-0000-4000-8000-000000000003", "00000000-0000-4000-8000-000000000004"]


def one(kind: str, key: str, context: str) -> str:
    """The prompt for one value."""
    return (
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {key} mentioned in the provided "
        f"text? The special magic {kind} for {key} mentioned in the provided text is"
    )


def several(keys: str, context: str) -> str:
    """The prompt for several values."""
    return (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {keys} mentioned in the "
        f"provided text? The special magic numbers for {keys} mentioned in the provided text are"
    )


def numbers(key: str, value: int) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def uuids(key: str, value: str) -> str:
    return f"One of the special magic uuids for {key} is: {value}."


def chain(names: list[str], value: int, lines: str) -> str:
    return (
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{lines}\n"
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, they are: "
    )


def common(words: list[str]) -> str:
    listed = " ".join(f"{place + 1}. {word}" for place, word in enumerate(words))
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{listed}\nQuestion: What are the 10 most common words in the above list? Answer: The top "
        "10 words that appear most often in the list are:"
    )


def reading(documents: str, query: str) -> str:
    return (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        f"\n\nThe following are given documents.\n\n{documents}\n\n"
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        f"\n\nQuestion: {query} Answer:"
    )


FIRST_TEN = " 1. w00 2. w01 3. w02 4. w03 5. w04 6. w05 7. w06 8. w07 9. w08 10. w09"
WORDS = [f"w{number:02}" for number in range(25)]
NAMES = ["ABC", "BCD", "CDE", "DEF", "EFG", "VWXYZ", "WXYZA", "XYZAB", "YZABC", "ZABCD"]
CHAIN_LINES = (
    f"VAR ABC = 11111\n{NOISE}\nVAR BCD = VAR ABC \n{NOISE}\nVAR CDE = VAR BCD \n{NOISE}\nVAR DEF = VAR CDE \n{NOISE}\n"
    f"VAR EFG = VAR DEF \n{NOISE}"
)
LONGER_CHAIN = (
    f"{NOISE}\nVAR VWXYZ = 22222\n{NOISE}\nVAR WXYZA = VAR VWXYZ \n{NOISE}\nVAR XYZAB = VAR WXYZA \n{NOISE}\n"
    f"VAR YZABC = VAR XYZAB \n{NOISE}\nVAR ZABCD = VAR YZABC \n{NOISE}"
)
CODED = ["..."] * 44 + ["bbbbbb"] * 11 + ["cccccc"] * 4 + ["dddddd"] * 2 + ["eeeeee"]

# For each task: size, what is drawn, the prompt, the answer behind it, the references.
EXAMPLES = {
    "niah_single_1": (
        2,
        {"words": ["a-b"], "numbers": [1234567], "samples": [[0], [1]]},
        one("number", "a-b", f"{NOISE}\n{numbers('a-b', 1234567)}\n{NOISE}"),
        " 1234567",
        ["1234567"],
    ),
    # Depth 51 percent (the 21st of forty) of four sentences: after the second. The text begins anew after its end.
    "niah_single_2": (
        14,
        {"words": ["a-b"], "numbers": [1234567], "samples": [[0], [20]]},
        one(
            "number",
            "a-b",
            f"One is here. Is two there? {numbers('a-b', 1234567)} Three is gone! Four is back. One is",
        ),
        " 1234567",
        ["1234567"],
    ),
    "niah_single_3": (
        3,
        {"words": ["a-b"], "numbers": [1], "samples": [[0], [39]]},
        one("uuid", "a-b", f"One is here. {uuids('a-b', UUIDS[0])} "),
        f" {UUIDS[0]}",
        [UUIDS[0]],
    ),
    # The second key is asked for; depths 0, 0 (3 percent), 1 (26) and 3 (77) of four sentences, two at one place.
    "niah_multikey_1": (
        12,
        {
            "words": ["a-b", "c-d", "c-d", "e-f", "g-h"],
            "numbers": [1000001, 1000002, 1000003, 1000004],
            "samples": [[1], [1, 0, 30, 10]],
        },
        one(
            "number",
            "c-d",
            f" {numbers('a-b', 1000001)}  {numbers('c-d', 1000002)} One is here. {numbers('e-f', 1000003)} Is two "
            f"there? Three is gone! {numbers('g-h', 1000004)} Four is back.",
        ),
        " 1000002",
        ["1000002"],
    ),
    # A needle of the haystack that would have the asked key is drawn again.
    "niah_multikey_2": (
        2,
        {
            "words": ["a-b", "c-d", "a-b", "e-f"],
            "numbers": [1000001, 1000002, 1000003, 1000004],
            "samples": [[0], [1]],
        },
        one("number", "a-b", f"{numbers('c-d', 1000002)}\n{numbers('a-b', 1000001)}\n{numbers('e-f', 1000004)}"),
        " 1000001",
        ["1000001"],
    ),
    "niah_multikey_3": (
        1,
        {"numbers": [1, 2, 3, 4], "samples": [[0], [0]]},
        one("uuid", UUIDS[0], f"{uuids(UUIDS[0], UUIDS[1])}\n{uuids(UUIDS[2], UUIDS[3])}"),
        f" {UUIDS[1]}",
        [UUIDS[1]],
    ),
    "niah_multivalue": (
        3,
        {
            "words": ["a-b"],
            "numbers": [1000001, 1000002, 1000003, 1000004],
            "samples": [[0], [0, 1, 2, 39]],
        },
        several(
            "a-b",
            f" {numbers('a-b', 1000001)}  {numbers('a-b', 1000002)}  {numbers('a-b', 1000003)} One is here. "
            f"{numbers('a-b', 1000004)} ",
        ),
        " 1000001, 1000002, 1000003, and 1000004",
        ["1000001", "1000002", "1000003", "1000004"],
    ),
    "niah_multiquery": (
        3,
        {
            "words": ["a-b", "c-d", "e-f", "g-h"],
            "numbers": [1000001, 1000002, 1000003, 1000004],
            "samples": [[3, 0, 2, 1], [39, 36, 37, 38]],
        },
        several(
            "g-h, a-b, e-f, and c-d",
            f" {numbers('a-b', 1000001)}  {numbers('c-d', 1000002)}  {numbers('e-f', 1000003)} One is here. "
            f"{numbers('g-h', 1000004)} ",
        ),
        " 1000004, 1000001, 1000003, and 1000002",
        ["1000004", "1000001", "1000003", "1000002"],
    ),
    "vt": (
        6,
        {"words": [*NAMES[:5], "VWXYZ", *NAMES[5:]], "numbers": [11111, 22222], "samples": [None, [1, 2, 3, 4, 5]]},
        f"{chain(NAMES[:5], 11111, CHAIN_LINES)} ABC BCD CDE DEF EFG\n\n{chain(NAMES[5:], 22222, LONGER_CHAIN)}",
        " VWXYZ WXYZA XYZAB YZABC ZABCD",
        NAMES[5:],
    ),
    "cwe": (
        11,
        {},
        f"{common(WORDS[:10] * 3 + WORDS[10:20])}{FIRST_TEN}\n{common(WORDS[:10] * 6 + WORDS[10:11])}",
        FIRST_TEN,
        WORDS[:10],
    ),
    "fwe": (
        74,
        {"words": ["aaaaaa", "bbbbbb", "cccccc", "bbbbbb", "dddddd", "eeeeee"]},
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(CODED)}\nQuestion: Do not provide any explanation. Please ignore the dots "
        "'....'. What are the three most frequently appeared words in the above coded text? Answer: According to the "
        "coded text above, the three most frequently appeared words are:",
        " bbbbbb, cccccc, dddddd",
        ["bbbbbb", "cccccc", "dddddd"],
    ),
    # The gold paragraph, the other one of its article, then any other (documents are sorted: coal first).
    "qa_1": (
        3,
        {},
        reading(
            "Document 1:\nThe fox lives in a den.\n\nDocument 2:\nThe owl lives in a tree.\n\n"
            "Document 3:\nCoal is black.",
            "Where does the fox live?",
        ),
        " a den",
        ["a den", "in a den", "den"],
    ),
    "qa_2": (
        1,
        {},
        reading(
            "Document 1:\nBridge\nThe bridge is in Aby. It is old.\n\nDocument 2:\nAby\nAby is a town in Norland.",
            "In which land is the town of the bridge?",
        ),
        " Norland",
        ["Norland"],
    ),
}


def test_all_thirteen_have_an_example() -> None:
    assert list(EXAMPLES) == list(RULER_TASKS) and len(RULER_TASKS) == 13


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_whole_prompt_is_as_written(name: str, tiny, scripted) -> None:
    size, drawn, prompt, answer, references = EXAMPLES[name]
    random = scripted(**drawn)
    sample = RULER_TASKS[name].maker(tiny, 256).make(random, 0, size)
    assert sample.prompt == prompt
    assert sample.answer == answer and list(sample.references) == references
    assert next(random.words, None) is None and next(random.numbers, None) is None, "less was drawn than scripted"


def test_tokens_reserved_are_rulers() -> None:
    reserved = {name: task.template.max_new_tokens for name, task in RULER_TASKS.items()}
    needles = {name: 128 for name in RULER_TASKS if name.startswith("niah")}
    assert reserved == needles | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


def test_from_4k_on_common_words_stand_more_often(tiny, scripted) -> None:
    words = [f"w{number:02}" for number in range(60)]
    more = tiny.words.__class__(tiny.words.keys, tuple(words))
    maker = RULER_TASKS["cwe"].maker(tiny.__class__(tiny.tokenizer, more, None, None, None), 4096)
    sample = maker.make(scripted(), 0, 12)
    assert sample.prompt == (
        f"{common(words[:10] * 10 + words[10:40] * 3)}{FIRST_TEN}\n{common(words[:10] * 30 + words[10:12] * 3)}"
    )
