"""What refusals suggest, read out of their words: a value that is suggested has to be one that the key may have."""

import re
from collections.abc import Iterator

OFFERED = re.compile(r"\b(?:try|set|use)\b")
PAIR = re.compile(r"((?:[A-Za-z_][\w-]*\.)+[\w.-]+|[a-z_]+)=([^\s,;:()]+)")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?$")
SECTION = re.compile(r"\S+?\.toml: ((?:[\w-]+\.)*[\w-]+): ")
ROOMS = ("context.", "model.", "parallel.", "data.", "optimizer.", "evals.")


def suggestions(message: str) -> Iterator[str]:
    """Each `key=value` that a refusal suggests; a bare number is for the key that its line begins with."""
    for line in message.partition("refused: ")[2].splitlines():
        blamed, *offers = OFFERED.split(line)
        first, section = PAIR.search(blamed), SECTION.match(line)
        for offer in offers:
            words = re.split(r";|: |\(|, (?:or leave|which)", offer)[0]
            pairs = PAIR.findall(words)
            if not pairs and first:
                numbers = (word.rstrip(".") for word in re.findall(r"[\w.+-]+", words))
                pairs = [(first[1], number) for number in numbers if NUMBER.match(number)]
            yield from (f"{_whole(key, section)}={value.rstrip('.')}" for key, value in pairs)


def blames(message: str, key: str) -> bool:
    """Whether the first key of some line is this one."""
    lines = message.splitlines()
    return any((found := PAIR.search(line)) and _whole(found[1], SECTION.match(line)) == key for line in lines)


def _whole(key: str, section: re.Match[str] | None) -> str:
    """A key that is told within a section, with the section."""
    if section is None or key.startswith((section[1], *ROOMS)):
        return key
    return f"{section[1]}.{key}"
