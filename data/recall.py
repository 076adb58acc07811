"""Needles in a haystack as training rows and as probes: ` [AB=1234] ` somewhere in text, `?AB=1234` at its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from data.mixture import Weight
from data.order import counted, derive, permute
from data.packing import ragged_ranges
from data.rows import NO_TARGET, Rows
from data.tokenizer import Tokenizer
from settings import Refusal, Section

# I and O are left out: they look like 1 and 0.
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = "0123456789"

# Each draw has its own place in a sample's stream of random numbers.
KEY, START, VALUE, DEPTH = 0, 1, 1 << 20, 2 << 20


class RecallSettings(Section):
    kind: Literal["recall"] = "recall"
    haystack: str
    """Name of the source whose training text hides the needles."""
    weight: Weight = 1.0
    """Share of the rows, against the other sources' weights."""
    answer_weight: float = Field(default=1.0, gt=0, le=1e6)
    """Loss weight of each token of the value that is asked for; every other token has 1."""
    needles: int = Field(default=1, ge=1, le=100_000)
    """Needles in a sample; the last line asks for one of them."""
    fractions: tuple[float, ...] = (0.25, 0.375, 0.5, 0.75, 1.0, 1.0)
    """Sample lengths as shares of the sequence length, one drawn for each row: short samples teach first."""
    key_letters: int = Field(default=2, ge=1, le=8)
    value_digits: int = Field(default=4, ge=1, le=18)

    @field_validator("fractions")
    @classmethod
    def _shares(cls, fractions: tuple[float, ...]) -> tuple[float, ...]:
        if not fractions or any(not 0 < fraction <= 1 for fraction in fractions):
            raise ValueError("each fraction is a share of the sequence length: above 0 and at most 1; give some")
        return fractions


@dataclass(frozen=True)
class NeedleSample:
    """One probe: tokens (length,) int64; `answer` is where the value stands in the closing question; `depth` is the
    share of the haystack before the needle that is asked for."""

    tokens: np.ndarray
    answer: slice
    depth: float


def needle_sample(  # noqa: PLR0917 (a recipe of plain numbers; callers name the rare ones)
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack_tokens: np.ndarray,
    length: int,
    depth: float | None = None,
    needles: int = 1,
    key_letters: int = 2,
    value_digits: int = 4,
) -> NeedleSample:
    """A sample of exactly `length` tokens, answer included; `depth` in 0..1, or None for anywhere.

    The haystack is one window of `haystack_tokens` (N,), inside one of its documents (parted by `end_of_text`) where
    one is long enough; otherwise the window crosses borders and holds their `end_of_text`.
    Raises Refusal where the needles and the question do not fit, or the haystack is shorter than the sample needs.
    """
    maker = NeedleMaker(tokenizer, needles, key_letters, value_digits)
    keys_S = np.array([rng.integers(1 << 63)], dtype=np.uint64)
    depths_SM = None if depth is None else np.array([[depth]])
    haystack = Haystack.parted(haystack_tokens, tokenizer.end_of_text)
    tokens, answer_starts_S, depths_S = maker.make(keys_S, haystack, np.array([length]), depths_SM)
    start = int(answer_starts_S[0])
    return NeedleSample(tokens, slice(start, start + value_digits), float(depths_S[0]))


def needle_grid(  # noqa: PLR0917 (as needle_sample)
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack_tokens: np.ndarray,
    length: int,
    depths: Sequence[float],
    key_letters: int = 2,
    value_digits: int = 4,
) -> list[NeedleSample]:
    """One haystack with a needle at each depth: a sample for each needle, which differ in their questions alone.

    Everything else as in `needle_sample`.
    """
    maker = NeedleMaker(tokenizer, len(depths), key_letters, value_digits)
    keys_S = np.full(len(depths), rng.integers(1 << 63), dtype=np.uint64)
    haystack = Haystack.parted(haystack_tokens, tokenizer.end_of_text)
    lengths_S, depths_SM = np.full(len(depths), length), np.tile(depths, (len(depths), 1))
    tokens, answer_starts_S, depths_S = maker.make(keys_S, haystack, lengths_S, depths_SM, np.arange(len(depths)))
    asked = zip(tokens.reshape(-1, length), answer_starts_S.tolist(), depths_S.tolist(), strict=True)
    return [NeedleSample(tokens_T, slice(start, start + value_digits), depth) for tokens_T, start, depth in asked]


class Haystack:
    """Tokens (N,) that windows are drawn from: D documents end to end, each with `end_of_text` behind its text.

    `lengths_D` counts that token. A draw is as likely to be any window that lies inside one document's text.
    """

    def __init__(self, tokens: np.ndarray, lengths_D: np.ndarray) -> None:
        self.tokens = tokens
        begins_D, text_D = np.cumsum(lengths_D) - lengths_D, lengths_D - 1
        by_length = np.argsort(-text_D, kind="stable")
        self._begins_D, self._text_D = begins_D[by_length], text_D[by_length]
        self._text_before_D = np.concatenate([[0], np.cumsum(self._text_D)])

    @classmethod
    def parted(cls, tokens: np.ndarray, end_of_text: int) -> "Haystack":
        """Documents found by their `end_of_text`; what follows the last one is a document too."""
        ends = np.append(np.flatnonzero(tokens == end_of_text), len(tokens))
        return cls(tokens, np.diff(ends, prepend=-1))

    def __len__(self) -> int:
        return len(self.tokens)

    def starts(self, keys_S: np.ndarray, room_S: np.ndarray) -> np.ndarray:
        """Where each sample's window of `room_S` tokens begins: inside a document, or anywhere if none is so long."""
        fitting_S = np.searchsorted(-self._text_D, -room_S, side="right")
        inside_S = self._starts_before(fitting_S, room_S)
        choices_S = np.where(fitting_S > 0, inside_S, len(self) - room_S + 1)
        drawn_S = (counted(keys_S, START) & np.uint64(2**62 - 1)).astype(np.int64) % choices_S
        # Bisection for the document: the last one with no more windows before it than were drawn.
        low_S, high_S = np.zeros_like(fitting_S), np.maximum(fitting_S - 1, 0)
        while (low_S < high_S).any():
            middle_S = (low_S + high_S + 1) // 2
            is_beyond_S = self._starts_before(middle_S, room_S) > drawn_S
            low_S, high_S = np.where(is_beyond_S, low_S, middle_S), np.where(is_beyond_S, middle_S - 1, high_S)
        in_document_S = self._begins_D[low_S] + drawn_S - self._starts_before(low_S, room_S)
        return np.where(fitting_S > 0, in_document_S, drawn_S)

    def _starts_before(self, document_S: np.ndarray, room_S: np.ndarray) -> np.ndarray:
        """How many windows of `room_S` tokens lie in the documents longer than this one (all of which fit)."""
        return self._text_before_D[document_S] - document_S * (room_S - 1)


class NeedleMaker:
    """Assembles many samples at once, in tokens: keys and values are written one token a letter and a digit,
    so that every needle of a format has the same length whatever the tokenizer merges."""

    def __init__(self, tokenizer: Tokenizer, needles: int, key_letters: int, value_digits: int) -> None:
        if needles > len(LETTERS) ** key_letters:
            raise Refusal(
                f"needles={needles} need different keys, but key_letters={key_letters} gives only "
                f"{len(LETTERS) ** key_letters}; use more letters"
            )
        self.needles, self.key_letters, self.value_digits = needles, key_letters, value_digits
        self._letters, self._digits = _single_tokens(tokenizer, LETTERS), _single_tokens(tokenizer, DIGITS)
        self._opening, self._equals, self._closing, self._question, self._newline = (
            np.array(tokenizer.encode(text), dtype=np.int64) for text in (" [", "=", "] ", "?", "\n")
        )
        inside = key_letters + len(self._equals) + value_digits
        self.needle_length = len(self._opening) + inside + len(self._closing)
        self.question_length = len(self._question) + inside + len(self._newline)
        self.answer_at = len(self._question) + key_letters + len(self._equals)

    @property
    def shortest(self) -> int:
        """The shortest sample: needles, question and one token of haystack."""
        return self.needles * self.needle_length + self.question_length + 1

    def make(
        self,
        keys_S: np.ndarray,
        haystack: Haystack,
        lengths_S: np.ndarray,
        depths_SM: np.ndarray | None,
        asked_S: np.ndarray | int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One sample for each key, end to end: (tokens (sum of lengths,) int64, where each answer starts in its own
        sample (S,), the depths of the asked needles as they came out (S,)).

        depths_SM: of the first so many needles; the others lie anywhere. asked_S: the needle that is asked for.
        """
        room_S = lengths_S - self.needles * self.needle_length - self.question_length
        self._check_room(haystack, lengths_S, room_S)
        samples, order = len(keys_S), np.arange(self.needles)
        offset_S = np.cumsum(lengths_S) - lengths_S
        needle_tokens_SMX, question_SX = self._write(keys_S, asked_S)

        start_S = haystack.starts(keys_S, room_S)
        before_SM = (counted(keys_S[:, None], DEPTH + order) % (room_S[:, None] + 1).astype(np.uint64)).astype(np.int64)
        if depths_SM is not None:
            before_SM[:, : depths_SM.shape[1]] = (depths_SM * room_S[:, None]).astype(np.int64)

        # A haystack token moves back by one needle for each needle before it.
        place = ragged_ranges(np.zeros_like(room_S), room_S)
        needles_before = np.zeros(len(place), dtype=np.int64)
        for number in range(self.needles):
            needles_before += np.repeat(before_SM[:, number], room_S) <= place
        tokens = np.empty(int(lengths_S.sum()), dtype=np.int64)
        target = np.repeat(offset_S, room_S) + place + needles_before * self.needle_length
        tokens[target] = haystack.tokens[np.repeat(start_S, room_S) + place]
        rank_SM = np.argsort(np.argsort(before_SM, axis=1, kind="stable"), axis=1, kind="stable")
        needle_at_SM = offset_S[:, None] + before_SM + rank_SM * self.needle_length
        tokens[needle_at_SM[:, :, None] + np.arange(self.needle_length)] = needle_tokens_SMX
        question_at_S = offset_S + lengths_S - self.question_length
        tokens[question_at_S[:, None] + np.arange(self.question_length)] = question_SX
        answer_start_S = lengths_S - self.question_length + self.answer_at
        assert len(answer_start_S) == samples
        return tokens, answer_start_S, before_SM[np.arange(samples), asked_S] / room_S

    def _write(self, keys_S: np.ndarray, asked_S: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Needles (S, M, needle length), keys different inside a sample, and the question for one of them (S, ...)."""
        samples, order = len(keys_S), np.arange(self.needles)
        asked = np.arange(samples), asked_S
        key_numbers_SM = permute(
            np.broadcast_to(order, (samples, self.needles)),
            len(LETTERS) ** self.key_letters,
            counted(keys_S, KEY)[:, None],
        )
        values_SM = (counted(keys_S[:, None], VALUE + order) % np.uint64(10**self.value_digits)).astype(np.int64)
        key_SMX = self._letters[_written(key_numbers_SM, len(LETTERS), self.key_letters)]
        value_SMX = self._digits[_written(values_SM, 10, self.value_digits)]
        everywhere = (samples, self.needles)
        needle = [
            np.broadcast_to(part, (*everywhere, part.shape[-1]))
            for part in (self._opening, key_SMX, self._equals, value_SMX, self._closing)
        ]
        question = [
            np.broadcast_to(part, (samples, part.shape[-1]))
            for part in (self._question, key_SMX[asked], self._equals, value_SMX[asked], self._newline)
        ]
        return np.concatenate(needle, axis=-1), np.concatenate(question, axis=-1)

    def _check_room(self, haystack: Haystack, lengths_S: np.ndarray, room_S: np.ndarray) -> None:
        if len(room_S) and room_S.min() < 1:
            raise Refusal(
                f"a sample of {lengths_S.min()} tokens has no room for needles={self.needles} of {self.needle_length} "
                f"tokens and a question of {self.question_length}; the shortest sample is {self.shortest} tokens"
            )
        if len(room_S) and room_S.max() > len(haystack):
            raise Refusal(
                f"a sample of {lengths_S.max()} tokens needs {room_S.max()} tokens of haystack, but the haystack has "
                f"{len(haystack)}; use a longer text or shorter samples"
            )


class RecallSource:
    """Rows full of needle samples; row n is a function of (key, n) and the sequence length alone.

    No label crosses a document's border, even where a window does because no document is as long as a sample.
    `below` is the fingerprint of the haystack's source.
    """

    def __init__(
        self, name: str, settings: RecallSettings, tokenizer: Tokenizer, haystack: Haystack, below: str
    ) -> None:
        self.name, self.settings = name, settings
        self.haystack, self._end_of_text = haystack, tokenizer.end_of_text
        self.maker = NeedleMaker(tokenizer, settings.needles, settings.key_letters, settings.value_digits)
        self.fingerprint = f"{derive(name, below, settings.model_dump_json(exclude={'weight'})):016x}"

    def check(self, sequence_length: int) -> None:
        """Refuse a sequence length at which the shortest sample, or the longest haystack, cannot be made."""
        shortest = min(self._sample_lengths(sequence_length))
        if shortest < self.maker.shortest:
            raise Refusal(
                f"data.sources.{self.name}: fractions={list(self.settings.fractions)} of sequence_length="
                f"{sequence_length} give samples of {shortest} tokens, the shortest possible is {self.maker.shortest}; "
                "use longer rows or larger fractions"
            )
        if sequence_length > len(self.haystack):
            raise Refusal(
                f"data.sources.{self.name}: sequence_length={sequence_length} is longer than its haystack "
                f"{self.settings.haystack!r} of {len(self.haystack)} tokens; use a longer text"
            )

    def mean_document_length(self, sequence_length: int) -> float:
        """Tokens of a sample on average over many rows of this length."""
        lengths = np.array(self._sample_lengths(sequence_length))
        full, left = np.divmod(sequence_length, lengths)
        return float(sequence_length / (full + (left >= self.maker.shortest)).mean())

    def rows(self, numbers_R: np.ndarray, sequence_length: int, key: int) -> Rows:
        """The rows with these numbers, each cut into samples of one length; the last takes what is left over."""
        row_keys_R = counted(key, numbers_R)
        choices = np.array(self._sample_lengths(sequence_length))
        length_R = choices[(counted(row_keys_R, 0) % np.uint64(len(choices))).astype(np.int64)]
        full_R, left_R = np.divmod(sequence_length, length_R)
        has_shorter_R = left_R >= self.maker.shortest
        counts_R = full_R + has_shorter_R
        lengths_S = np.repeat(length_R, counts_R)
        last = np.cumsum(counts_R) - 1
        lengths_S[last] = np.where(has_shorter_R, left_R, length_R + left_R)
        keys_S = counted(np.repeat(row_keys_R, counts_R), 1 + ragged_ranges(np.zeros_like(counts_R), counts_R))
        tokens, answer_start_S, _ = self.maker.make(keys_S, self.haystack, lengths_S, None)

        ends_S = np.cumsum(lengths_S)
        labels = np.append(tokens[1:], NO_TARGET)
        labels[ends_S - 1] = NO_TARGET
        labels[tokens == self._end_of_text] = NO_TARGET
        weights = (labels != NO_TARGET).astype(np.float32)
        # The token before predicts: weights stand where labels stand.
        answer_SX = (ends_S - lengths_S + answer_start_S - 1)[:, None] + np.arange(self.maker.value_digits)
        weights[answer_SX] = self.settings.answer_weight
        shape = (len(numbers_R), sequence_length)
        tokens_RT, labels_RT, weights_RT = (array.reshape(shape) for array in (tokens, labels, weights))
        return Rows(tokens_RT, labels_RT, weights_RT, lengths_S, counts_R, np.zeros_like(counts_R))

    def _sample_lengths(self, sequence_length: int) -> list[int]:
        return [max(1, round(fraction * sequence_length)) for fraction in self.settings.fractions]


def _single_tokens(tokenizer: Tokenizer, letters: str) -> np.ndarray:
    ids = [tokenizer.encode(letter) for letter in letters]
    if any(len(one) != 1 for one in ids):
        raise Refusal(
            "needles need a tokenizer that writes each letter A-Z and digit 0-9 as one token when it stands alone"
        )
    return np.array([one[0] for one in ids], dtype=np.int64)


def _written(numbers: np.ndarray, base: int, places: int) -> np.ndarray:
    """Numbers as digits of `base`, most significant first: one more dimension of size `places`."""
    return numbers[..., None] // base ** np.arange(places - 1, -1, -1) % base
