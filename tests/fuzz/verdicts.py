"""What a refusal has to be."""

import re

from tests.fuzz.trials import Outcome

MOST_LETTERS = 6000
"""Of a message: what a person still reads."""
MOST_OF_A_LINE = 2000
OF_A_FILE = re.compile(
    r"at line \d+|at byte \d+|at end of document|not valid TOML|no such configuration file|may not be read"
    r"|cannot be read|is no path of|extends |is a folder|is a pipe|write section\.key=value|deep inside one another"
)
"""What is said of a file or a word of the command line in which no key can be told."""


def wrong_with(outcome: Outcome, known: set[str] | None) -> list[str]:
    """What is not as promised of a command that ended: nothing, where it ended well or refused as it should.

    known: the keys of which a refusal has to name one; None: it is about files.
    """
    if outcome.status in (0, "arrived"):
        return [f"says to the standard error: {outcome.err[:300]}"] if outcome.err else []
    if outcome.status != 2:
        return [f"ended with {outcome.status}: {outcome.err[-1500:]}"]
    found = [f"left behind: {', '.join(outcome.left[:5])}"] if outcome.left else []
    return found + wrong_with_message(outcome.err, known)


def wrong_with_message(text: str, known: set[str] | None) -> list[str]:
    """What is not as promised of one refusal on the standard error."""
    found = []
    message = text.removeprefix("refused: ").removesuffix("\n")
    if not re.match(r"(rank \d+: )?refused: ", text) or text.count("refused: ") != 1:
        found.append(f"not one refusal: {text[:300]!r}")
    if "Traceback" in text or "Warning" in text:
        found.append(f"a traceback or a warning: {text[-600:]}")
    if len(text) > MOST_LETTERS or max(map(len, message.split("\n"))) > MOST_OF_A_LINE:
        found.append(f"{len(text)} letters long: {text[:200]!r}")
    odd = [letter for letter in message.replace("\n", "") if not letter.isprintable()]
    if odd:
        found.append(f"letters that a terminal may obey, {odd[:3]}: {message[:300]!r}")
    if known is not None and not names_a_key(message, known):
        found.append(f"names no key: {message[:300]!r}")
    return found


def names_a_key(message: str, known: set[str]) -> bool:
    """Whether a key of the schema, or one that somebody wrote, stands there as one: dotted, or before = or a colon."""
    if OF_A_FILE.search(message) or any(table in known for table in re.findall(r"table \[([\w.]+)\]", message)):
        return True
    if any(key.startswith(shown) for shown in re.findall(r"'([^']{60,})\.\.\.'", message) for key in known):
        return True  # a key that is too long to be shown whole
    if any(f".{key}=" in message for key in known if key and not key.isidentifier()):
        return True  # one of signs alone
    for match in re.finditer(r"([^\s=:`'\"(,;]+)(=|: |:$|\.|; |`|'|\"| |,|$)", message):
        parts = [part for part in match[1].split(".") if part and not part.isdecimal()]
        if parts and parts[-1] in known and (len(parts) > 1 or match[2] in ("=", ": ") or "_" in parts[-1]):
            return True
    return False
