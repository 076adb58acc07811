"""Our models as lm-evaluation-harness asks them: `simple_evaluate(model=HarnessModel(...), tasks=[...])`.

The package (lm-eval, an extra) brings tasks, prompts and scores; here are its three questions alone: how likely a
continuation is, how likely a whole text is, and what the model writes. Its own adapter for Hugging Face, given the
exported checkpoint, answers the same.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evals.continuing import continue_greedily
from evals.questions import Question, ask
from evals.scoring import Materials
from model.transformer import Transformer
from settings import Refusal

Beyond = Literal["refuse", "cut", "read"]
"""What is done with a request that is longer than the model's length: refuse it, leave out its beginning as lm-eval's
own adapters do, or read all of it."""

MAX_NEW_TOKENS = 256
"""What a task gets that does not say how much may be written; lm-eval's own number."""
FIRST_PIECE = 16
"""Tokens that are written before it is first looked whether a text is over; then twice as many, and so on."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the number of tokens to write."""
OF_SAMPLING = {"temperature", "top_p", "top_k", "min_p"}


@dataclass(frozen=True)
class Writing:
    """How a text is to be continued."""

    until: tuple[str, ...]
    """What ends it, and is no longer part of it."""
    max_new_tokens: int


class HarnessModel(TemplateLM):
    """One model, greedy and deterministic. A text begins after the end of another: that is its empty context."""

    def __init__(
        self,
        model: Transformer,
        materials: Materials,
        length: int,
        beyond: Beyond = "refuse",
        say: Callable[[str], None] = print,
    ) -> None:
        """length: tokens of context and continuation together, usually the trained length; whole texts are scored in
        windows of so many. say: is told how many requests were longer, where they are not refused."""
        super().__init__()
        self.model, self.materials, self.length, self.beyond, self.say = model, materials, length, beyond, say

    @property
    def eot_token_id(self) -> int:
        return self.materials.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of a text; there are no special tokens to add."""
        return self.materials.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum of the log-probabilities of each text's tokens, every one with as much before it as a window has."""
        windows, text_of = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                text_of.append(number)
        totals = np.zeros(len(requests))
        np.add.at(totals, text_of, [logprob for logprob, _ in self._loglikelihood_tokens(windows)])
        return totals.tolist()

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: object) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether each token is the first choice) of (context, continuation) in tokens."""
        # The last token is only predicted: a model of L tokens reads L + 1.
        contexts = self._fitted([context for _, context, _ in requests], [len(after) - 1 for *_, after in requests])
        questions = [
            Question(np.array(context), np.array(after), name=f"a request of {len(context)} and {len(after)} tokens")
            for context, (*_, after) in zip(contexts, requests, strict=True)
        ]
        led = ask(self.model, self.materials, questions).led
        sums = led.logprob_S * [len(question.answer) for question in questions]
        return list(zip(sums.tolist(), led.is_exact_S.tolist(), strict=True))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context: the most likely tokens, up to the first of its end marks."""
        writings = [read_writing(request.args[1]) for request in requests]
        contexts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        contexts = self._fitted(contexts, [writing.max_new_tokens for writing in writings])
        return self._written([np.array(context) for context in contexts], writings)

    def _written(self, prompts: list[np.ndarray], writings: Sequence[Writing]) -> list[str]:
        """Written in pieces, so that a text that ends early costs no tokens up to its limit."""
        written = [np.empty(0, dtype=np.int64) for _ in prompts]
        texts = ["" for _ in prompts]
        going, piece = list(range(len(prompts))), FIRST_PIECE
        while going:
            more = [min(piece, writings[row].max_new_tokens - len(written[row])) for row in going]
            continued = [np.concatenate([prompts[row], written[row]]) for row in going]
            pieces = continue_greedily(self.model, self.materials, continued, more)
            still = []
            for row, tokens, asked in zip(going, pieces, more, strict=True):
                written[row] = np.concatenate([written[row], tokens])
                whole = self.materials.tokenizer.decode(written[row])
                texts[row] = before(whole, writings[row].until)
                is_over = texts[row] != whole or len(tokens) < asked
                if not is_over and len(written[row]) < writings[row].max_new_tokens:
                    still.append(row)
            going, piece = still, 2 * piece
        return texts

    def _fitted(self, contexts: list[list[int]], reserved: Sequence[int]) -> list[list[int]]:
        """The contexts as they are read, with so much room behind each."""
        rooms = [self.length - behind for behind in reserved]
        too_long = [len(context) for context, room in zip(contexts, rooms, strict=True) if len(context) > room]
        if not too_long or self.beyond == "read":
            self._tell(too_long, len(contexts), "read beyond it")
            return contexts
        if self.beyond == "refuse" or min(rooms) < 1:
            longest = max(len(context) + behind for context, behind in zip(contexts, reserved, strict=True))
            raise Refusal(
                f"{len(too_long)} of {len(contexts)} requests are longer than length={self.length}; the longest takes"
                f' {longest} tokens. beyond="cut" (--beyond cut) leaves out their beginnings, as lm-eval does else,'
                ' where what follows fits; beyond="read" reads all of them; or ask for fewer shots'
            )
        self._tell(too_long, len(contexts), "their beginnings left out")
        return [context[-room:] for context, room in zip(contexts, rooms, strict=True)]

    def _tell(self, too_long: Sequence[int], count: int, what: str) -> None:
        if too_long:
            self.say(f"{len(too_long)} of {count} requests are longer than length={self.length}: {what}")


def before(text: str, marks: Iterable[str]) -> str:
    """The text up to the first of these."""
    ends = [place for mark in marks if mark and (place := text.find(mark)) >= 0]
    return text[: min(ends, default=len(text))]


def read_writing(arguments: dict[str, Any]) -> Writing:
    """What a task says of writing. Raises Refusal where it asks for draws, or for what is not known here."""
    asked = dict(arguments)
    until = asked.pop("until", None) or ()
    limits = [asked.pop(name) for name in LIMITS if asked.get(name) is not None]
    is_hot = float(asked.get("temperature") or 0.0) > 0
    if asked.pop("do_sample", is_hot):
        raise Refusal(
            f"generation_kwargs={arguments}: writes the most likely tokens alone, so that a checkpoint has one number;"
            " set do_sample=false and temperature=0 (simple_evaluate: gen_kwargs)"
        )
    unknown = sorted(asked.keys() - OF_SAMPLING - set(LIMITS))
    if unknown:
        raise Refusal(f"generation_kwargs.{unknown[0]}={asked[unknown[0]]!r}: not known here; leave it out")
    marks = (until,) if isinstance(until, str) else tuple(until)
    return Writing(marks, int(limits[0]) if limits else MAX_NEW_TOKENS)
