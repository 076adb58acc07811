"""Questions: what is asked is what is scored, and a model that writes gets the same verdict as one that is led."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from context.rotary import DefaultRotary
from evals.continuing import alike, continue_greedily
from evals.intervals import interval
from evals.questions import Question, ask, to_rows
from evals.ranks import Ranks
from model.initialize import initialize
from model.transformer import ModelSettings, Transformer, build_model
from parallel.world import World
from settings import Refusal, validate
from tests.evals.forwards import counted

LATENT = {"kind": "latent", "num_heads": 2, "latent_rank": 8}
LATENT |= {"nope_channels": 4, "rope_channels": 4, "value_channels": 6}
MODELS = {
    "full": {"attention": {"num_heads": 2, "num_kv_heads": 1}},
    "windows": {"attention": {"num_heads": 2, "num_kv_heads": 1, "window": 7}, "pattern": ["window", "full"]},
    "latent": {"attention": LATENT},
    "experts": {
        "attention": {"num_heads": 2, "num_kv_heads": 1},
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_width": 16},
    },
}


def decoder(name: str) -> Transformer:
    table = {"num_layers": 2, "width": 16, "feed_forward_width": 24, "initial_std": 0.5, **MODELS[name]}
    model = build_model(validate(table, ModelSettings, ""), 257)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=100.0))
    return model.eval()


@torch.no_grad()
def plainly(model: torch.nn.Module, prompt: np.ndarray, num_tokens: int, end_of_text: int = 256) -> list[int]:
    """One prompt, read anew for every token."""
    tokens = prompt.tolist()
    for _ in range(num_tokens):
        hidden_BTD, _ = model(torch.tensor([tokens]))
        following = int((hidden_BTD[0, -1] @ model.head_weight.T).argmax())
        if following == end_of_text:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


def prompts(*lengths: int, shared: int = 0, seed: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    beginning = rng.integers(0, 256, size=shared)
    return [np.concatenate([beginning, rng.integers(0, 256, size=length - shared)]) for length in lengths]


@pytest.mark.parametrize("budget", [7, 60, 10**6])
@pytest.mark.parametrize("name", MODELS)
def test_many_prompts_are_continued_as_each_alone(name: str, budget: int, materials) -> None:
    model = decoder(name)
    asked = prompts(20, 17, 20, 23, 9) + prompts(31, 28, 30, shared=24)
    asked += [
        tokens
        for pair in zip(*(prompts(26, 27, shared=20, seed=seed) for seed in (6, 7)), strict=True)
        for tokens in pair
    ]
    wanted = [6, 3, 0, 5, 8, 1, 7, 4, 3, 5, 4, 6]
    found = continue_greedily(model, replace(materials, tokens_per_forward=budget), asked, wanted)
    assert [row.tolist() for row in found] == [plainly(model, *pair) for pair in zip(asked, wanted, strict=True)]
    assert len({token for row in found for token in row.tolist()}) > 5, "a model that always says the same shows little"


def test_what_prompts_share_is_read_once_and_every_other_token_once(materials) -> None:
    model = decoder("full")
    with counted(model) as counts:
        continue_greedily(model, materials, prompts(31, 28, 30, shared=24), [4, 4, 4])
    assert sum(counts) == 24 + 3 * 4 + 3 * (3 + 4 - 1)


class Pair(World):
    """Two ranks in one process: the second comes after the first, and its sums add what the first put in."""

    def sum(self, tensor):
        if self.rank == 0:
            SUMMED.append(tensor.clone())
            return tensor
        return tensor + SUMMED.pop(0)


SUMMED: list[torch.Tensor] = []


def test_ranks_write_different_prompts_and_get_all(materials) -> None:
    model = decoder("full")
    asked, wanted = prompts(20, 17, 9) + prompts(31, 28, 30, shared=24), [6, 0, 8, 7, 4, 5]
    found, counts = [], []
    for rank in (0, 1):
        with counted(model) as of_rank:
            found = continue_greedily(model, replace(materials, ranks=Ranks(Pair(rank, 2))), asked, wanted)
        counts.append(sum(of_rank))
    assert [row.tolist() for row in found] == [plainly(model, *pair) for pair in zip(asked, wanted, strict=True)]
    with counted(model) as alone:
        continue_greedily(model, materials, asked, wanted)
    assert max(counts) < sum(alone) and not SUMMED
    groups = alike(asked, 8).tolist()
    assert groups[3:] == [groups[3]] * 3 and len(set(groups)) == 4, "what begins alike stays on one rank"


def test_writing_ends_at_the_end_of_text_row_by_row(models, materials) -> None:
    """Each prompt asks for a stretch of the text before its question mark; end_of_text stands in one of them."""
    text = np.array([*b"abc", 256, *b"def?ab"])
    seer = models.Seer(np.concatenate([text, [*b"cd", 256, *b"xyz"]]), start=0)
    asked = [np.array([*b"abc", 256, *b"def?ab"]), np.array([*b"bc", 256, *b"def?abc"])]
    found = continue_greedily(seer, materials, asked, [9, 1])
    assert [bytes(row.tolist()) for row in found] == [b"cd", b"d"]


def question(prompt: bytes, answer: bytes, **rest) -> Question:
    return Question(np.array([*prompt]), np.array([*answer]), **rest)


def test_a_copier_is_right_and_its_answers_are_its_own(models, materials) -> None:
    questions = [question(b"[AB=12] .. [CD=345] ?AB=", b"12"), question(b"[AB=12] .. [CD=345] ?CD=", b"345")]
    questions += [question(b"[AB=12] .. [CD=345] ?CD=", b"346", max_new_tokens=6)]
    answers = ask(models.CopyOracle(), materials, questions, writes=True)
    assert answers.led.is_exact_S.tolist() == answers.is_written_S.tolist() == [True, True, False]
    assert answers.led.accuracy_S.tolist() == [1, 1, pytest.approx(2 / 3)]
    assert answers.led.logprob_S[:2] == pytest.approx(0, abs=1e-5) and answers.led.logprob_S[2] < -5
    assert answers.texts == ("12", "345", "345] ?"), "what is reserved is written, and no more"
    cell = answers.cell("facts", 64, depth=0.5)
    assert (cell.score, cell.count, cell.depth) == (pytest.approx(2 / 3), 3, 0.5)
    assert cell.extra["generated"] == cell.score and "exact" not in cell.extra
    assert cell.extra["low"] < cell.score < cell.extra["high"]
    assert cell.extra["token_accuracy"] == pytest.approx(8 / 9)
    other = answers.cell("facts", 64, score_S=np.array([0.5, 1.0, 0.0]))
    assert other.score == 0.5 and other.extra["exact"] == other.extra["generated"] == pytest.approx(2 / 3)
    assert (other.extra["low"], other.extra["high"]) == interval(np.array([0.5, 1.0, 0.0]))
    assert (
        "low" not in ask(models.CopyOracle(), materials, questions[:1]).cell("one", 64, score_S=np.array([0.5])).extra
    )


@pytest.mark.parametrize("name", MODELS)
def test_led_and_written_verdicts_agree(name: str, materials) -> None:
    """Where the answer is exactly what the model goes on to write it is right both ways, and wrong both ways from its
    first wrong token on."""
    model, questions = decoder(name), []
    for number, prompt in enumerate(prompts(24, 19, 24, 26, 11, 24)):
        answer = np.array(plainly(model, prompt, 5))
        if number % 3:
            answer[number % len(answer)] = (answer[number % len(answer)] + 1) % 256
        questions.append(Question(prompt, answer, max_new_tokens=9))
    answers = ask(model, materials, questions, writes=True)
    assert answers.led.is_exact_S.tolist() == answers.is_written_S.tolist() == [True, False, False, True, False, False]


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_company_change_no_score(name: str, materials) -> None:
    model, rng = decoder(name), np.random.default_rng(0)
    questions = [
        Question(prompt, rng.integers(0, 256, size=size))
        for prompt, size in zip(prompts(40, 37, 39, 12, 40), (1, 4, 2, 3, 2), strict=True)
    ]
    together = ask(model, materials, questions)
    for index, asked in enumerate(questions):
        alone = ask(model, materials, [asked])
        assert alone.led.logprob_S[0] == pytest.approx(together.led.logprob_S[index], abs=2e-5)
        assert alone.led.is_exact_S[0] == together.led.is_exact_S[index]
    assert together.written is None


def test_only_answers_are_asked_and_padding_stands_behind_them() -> None:
    rows = to_rows([question(b"abcd", b"XY"), question(b"ef", b"Z")], padding=256)
    assert rows.tokens_BT.tolist() == [[*b"abcdX"], [*b"efZ", 256, 256]]
    assert rows.labels_BT.tolist() == [[-100, -100, -100, *b"XY"], [-100, *b"Z", -100, -100, -100]]


def test_rows_of_nearly_one_length_are_read_together(materials) -> None:
    model = decoder("full")
    questions = [Question(prompt, np.array([1])) for prompt in prompts(40, 39, 36, 34, 33)]
    with counted(model) as counts:
        ask(model, materials, questions)
    assert counts == [3 * 40, 2 * 34], "36 is less than an eighth below 40, 34 is not"


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(Refusal, match=r"riddle: 6 prompt tokens and 3 reserved .* do not fit length=8; use 9 or more"):
        question(b"abcdef", b"xyz", length=8, name="riddle")
    with pytest.raises(Refusal, match=r"4 reserved .* use 10 or more"):
        question(b"abcdef", b"xyz", length=8, max_new_tokens=4)
    assert question(b"abcdef", b"xyz", length=9).size == 9
    for prompt, answer in ((b"", b"x"), (b"x", b"")):
        with pytest.raises(Refusal, match="give both"):
            question(prompt, answer)


def test_a_question_of_two_texts(materials) -> None:
    asked = Question.of_text(materials.tokenizer, "where?", " hére", references=("hére",), max_new_tokens=2)
    assert bytes(asked.prompt.tolist()) == b"where?" and bytes(asked.answer.tolist()).decode() == " hére"
    assert asked.references == ("hére",) and asked.reserved == 6
