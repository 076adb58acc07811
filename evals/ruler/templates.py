"""RULER's prompts word for word: who changes a letter measures something else.

Quoted from NVIDIA/RULER (Apache-2.0): scripts/data/synthetic/constants.py (prompts, tokens to generate), niah.py
(needle, noise, singular), variable_tracking.py and qa.py (documents), as its main branch has them since 2025. Copies of
2024, and with them lm-evaluation-harness, have "assgined" where VARIABLES has "assigned".
"""

from dataclasses import dataclass

from evals.passkey import FILLER


@dataclass(frozen=True)
class Template:
    """What a task asks. The answer's beginning is given, so that no model declines; a base model gets nothing else."""

    text: str
    answer_prefix: str
    max_new_tokens: int
    """Tokens reserved for what the model writes; a length counts them."""

    def fill(self, **fields: object) -> str:
        return (self.text + self.answer_prefix).format(**fields)


NOISE = FILLER
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
DOCUMENT = "Document {i}:\n{document}"

NEEDLES = Template(
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
    128,
)
VARIABLES = Template(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{num_v} variables are assigned the value {query}, they are: ",
    30,
)
COMMON_WORDS = Template(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
FREQUENT_WORDS = Template(
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
ANSWER_ALONE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
READING = Template(
    ANSWER_ALONE + "\n\nThe following are given documents.\n\n{context}\n\n" + ANSWER_ALONE + "\n\nQuestion: {query}",
    " Answer:",
    32,
)


def singular(template: Template) -> Template:
    """The prompt for one needle: RULER replaces words, and every "are" in one after the other."""

    def replaced(text: str) -> str:
        return text.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("answers", "answer")

    return Template(replaced(template.text), replaced(template.answer_prefix), template.max_new_tokens)
