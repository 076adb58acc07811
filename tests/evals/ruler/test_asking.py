"""RULER as the suite asks it: who knows every answer scores 1, in whatever order and case, and what is missing is
refused before a model is asked."""

import json
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from evals.intervals import interval
from evals.questions import Question
from evals.ruler.asking import RulerSettings, check, chosen, gather, run
from evals.ruler.series import Series
from evals.ruler.tasks import RULER_TASKS
from settings import Refusal

VOCAB, END = 257, 256


class Teller(nn.Module):
    """Says behind each prompt what it was told to, then ends; knows nothing else."""

    def __init__(self, questions: list[Question], say: Callable[[Question], str]) -> None:
        super().__init__()
        self.said = [(asked.prompt, [*say(asked).encode(), END]) for asked in questions]
        self.head_weight = nn.Parameter(torch.eye(VOCAB))

    def forward(self, tokens_BT, positions_BT=None, mask=None):
        hidden_BTD = torch.zeros(*tokens_BT.shape, VOCAB)
        for row, tokens in enumerate(tokens_BT.numpy()):
            for prompt, said in self.said:
                if np.array_equal(tokens[: len(prompt)], prompt):
                    after = tokens[len(prompt) :].tolist()
                    right = next((i for i, (a, b) in enumerate(zip(after, said, strict=False)) if a != b), len(after))
                    for index in range(min(right + 1, len(said))):
                        hidden_BTD[row, len(prompt) - 1 + index, said[index]] = 20.0
        return hidden_BTD, ()


def settings(files, **changes) -> RulerSettings:
    table = {"lengths": (2304,), "samples": 2, "squad": str(files.squad), "hotpotqa": str(files.hotpotqa)}
    return RulerSettings(**{**table, "haystack": "web", **changes})


def questions_of(chosen_settings: RulerSettings, materials) -> list[Question]:
    given, count = gather(chosen_settings, materials), chosen_settings.samples
    return [
        question
        for length in chosen_settings.lengths
        for name in chosen(chosen_settings, given)
        for question in Series(name, length, chosen_settings.seed, given).questions(count)
    ]


def text_of(question: Question) -> str:
    return bytes(question.answer.tolist()).decode()


def test_who_knows_every_answer_scores_one_everywhere(files, materials) -> None:
    asked = settings(files)
    cells = run(Teller(questions_of(asked, materials), text_of), asked, materials, seed=0)
    names = [f"ruler/{name}" for name in RULER_TASKS]
    assert [cell.task for cell in cells] == [*names, "ruler/average"]
    for cell in cells[:13]:
        assert (cell.score, cell.count, cell.length, cell.depth) == (1, 2, 2304, None), cell.task
        assert cell.extra["exact"] == cell.extra["generated"] == cell.extra["token_accuracy"] == 1
        assert cell.extra["answer_logprob"] == pytest.approx(0, abs=1e-5)
        assert cell.extra["low"] < cell.extra["high"] == 1
        assert 2000 < cell.extra["mean_length"] <= 2304, "filled, and never longer"
    assert (cells[13].score, cells[13].count, cells[13].extra["tasks"]) == (1, 2, 13)
    assert cells == run(Teller(questions_of(asked, materials), text_of), asked, materials, seed=0)


def test_order_and_case_do_not_matter_when_written_and_half_is_half(files, materials) -> None:
    names = ("niah_multiquery", "vt", "fwe")
    asked = settings(files, tasks=names, lengths=(2304, 2500))
    questions = questions_of(asked, materials)
    backwards = Teller(questions, lambda question: " ".join(reversed(question.references)).upper())
    for cell in run(backwards, asked, materials, seed=0)[:3]:
        assert cell.score == 1 and cell.extra["exact"] == cell.extra["generated"] == 0
    first = Teller(questions, lambda question: f" {question.references[0]} " if question.length == 2304 else "")
    cells = run(first, asked, materials, seed=0)
    shares = [1 / 4, 1 / 5, 1 / 3]
    assert [cell.score for cell in cells[:3]] == pytest.approx(shares)
    assert [cell.score for cell in cells[4:7]] == [0, 0, 0]
    assert [(cell.task, cell.length) for cell in cells[3::4]] == [("ruler/average", 2304), ("ruler/average", 2500)]
    average = sum(shares) / 3
    found = [cell.score for cell in (cells[3], *cells[8:])]
    assert found == pytest.approx([average, average / 3, 2 * average / 3, 0])
    assert [cell.task for cell in cells[8:]] == [
        "ruler/weighted_increasing",
        "ruler/weighted_decreasing",
        "effective_length/ruler",
    ]
    assert {cell.length for cell in cells[8:]} == {2500}


def test_the_effective_length_is_the_longest_above_the_threshold(files, materials) -> None:
    asked = settings(files, tasks=("niah_single_1",), lengths=(600, 700, 800))
    knows = Teller([one for one in questions_of(asked, materials) if one.length != 700], text_of)
    *_, effective = run(knows, asked, materials, seed=0)
    assert effective.task == "effective_length/ruler" and (effective.score, effective.length) == (800, 800)
    assert effective.extra == {"threshold": 0.856} and effective.count == 3


def test_no_tasks_are_not_all_of_them(files) -> None:
    with pytest.raises(ValidationError, match="at least 1 item"):
        settings(files, tasks=())


def test_an_average_is_over_tasks_and_samples(files, materials) -> None:
    asked = settings(files, tasks=("niah_single_1", "niah_single_2"), samples=4, lengths=(700,))
    questions = questions_of(asked, materials)
    one, other, average = run(Teller(questions[:3] + questions[4:5], text_of), asked, materials, seed=0)
    assert (one.score, other.score, average.score, average.count) == (0.75, 0.25, 0.5, 4)
    assert (average.extra["low"], average.extra["high"]) == interval([1.0, 0.5, 0.5, 0.0])


def test_another_name_of_an_answer_is_as_good(files, materials) -> None:
    asked = settings(files, tasks=("qa_1",), samples=1, lengths=(800,))
    teller = Teller(questions_of(asked, materials), lambda question: f"It lives {question.references[1]}, I think")
    cell, *_ = run(teller, asked, materials, seed=0)
    assert cell.score == 1 and cell.extra["exact"] == 0


def test_without_writing_the_score_is_teacher_forced(files, materials) -> None:
    asked = settings(files, tasks=("niah_single_1", "vt"), generate=False)
    teller = Teller(questions_of(asked, materials), text_of)
    cells = run(teller, asked, materials, seed=0)
    assert [cell.score for cell in cells[:3]] == [1, 1, 1]
    assert all("generated" not in cell.extra and "exact" not in cell.extra for cell in cells)


def test_a_guesser_scores_nothing(files, materials, models) -> None:
    asked = settings(files, tasks=("niah_single_1", "qa_2"), samples=2, lengths=(800,))
    *tasks, average = run(models.RandomModel(), asked, materials, seed=0)
    assert all(cell.score == 0 and cell.extra["answer_logprob"] < -3 for cell in tasks)
    assert average.score == 0 and average.extra["low"] == 0


def test_tasks_are_those_whose_texts_are_given(files, materials) -> None:
    def names(**changes) -> list[str]:
        table = settings(files, **changes)
        return chosen(table, gather(table, materials))

    assert names() == list(RULER_TASKS)
    assert names(squad=None) == [name for name in RULER_TASKS if name != "qa_1"]
    assert names(tasks=("vt", "cwe")) == ["vt", "cwe"]
    materials.held_out.clear()
    without = [name for name, task in RULER_TASKS.items() if task.needs != "essay"]
    assert names(haystack=None) == without and len(without) == 8
    with pytest.raises(
        Refusal, match=r"evals.ruler.tasks: niah_single_2 needs a text; give a source .* or haystack_file"
    ):
        names(haystack=None, tasks=("niah_single_2",))


def test_the_essay_is_the_beginning_of_a_text_of_ones_choice(files, materials) -> None:
    (files.folder / "essay.txt").write_text("One  two.\n\nThree\tfour!")
    (files.folder / "essay.json").write_text(json.dumps({"text": "One two. Three four!"}))
    for name in ("essay.txt", "essay.json"):
        path = str(files.folder / name)
        given = gather(settings(files, haystack=None, haystack_file=path), materials)
        assert list(given.essay) == ["One", "two.", "Three", "four!"]
    words = gather(settings(files), materials).essay
    held_out = materials.tokenizer.decode(materials.held_out["web"][materials.held_out["web"] != END])
    assert "".join(words) == "".join(held_out.split())[: len("".join(words))]
    assert 2304 < len(" ".join(words)) <= 4 * 2304


def test_what_is_not_there_is_refused_by_name(files, materials) -> None:
    for name, text in (("bad.json", "{"), ("none.json", '{"text": " "}'), ("list.json", "[]")):
        (files.folder / name).write_text(text)
        with pytest.raises(Refusal, match=rf"evals.ruler.haystack_file='.*{name}'"):
            gather(settings(files, haystack=None, haystack_file=str(files.folder / name)), materials)
    with pytest.raises(Refusal, match=r"evals.ruler.squad='.*gone.json': not a file of that form"):
        gather(settings(files, squad=str(files.folder / "gone.json")), materials)
    with pytest.raises(Refusal, match=r"evals.ruler.hotpotqa='.*squad.json': not a file of that form"):
        gather(settings(files, hotpotqa=str(files.squad)), materials)
    with pytest.raises(Refusal, match=r"evals.ruler.hotpotqa='.*list.json': has a question without"):
        gather(settings(files, hotpotqa=str(files.folder / "list.json")), materials)
    with pytest.raises(Refusal, match=r"evals.ruler.haystack='wen' .*did you mean 'web'"):
        check(settings(files, haystack="wen"), materials)
    with pytest.raises(Refusal, match=r"words=\"wonderwords\": the package is not installed"):
        gather(settings(files, words="wonderwords"), materials)


def test_lengths_that_do_not_fit_are_refused_at_the_start(files, materials) -> None:
    check(settings(files), materials)
    with pytest.raises(Refusal, match=r"evals.ruler.lengths=700 does not fit: the smallest prompts of niah_multiquery"):
        check(settings(files, lengths=(2304, 700), tasks=("niah_single_1", "niah_multiquery")), materials)
    with pytest.raises(Refusal, match=r"qa_2 cannot be asked: sample 3 has no question"):
        check(settings(files, tasks=("qa_2",), samples=3), materials)
    for name, key in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
        with pytest.raises(Refusal, match=f"{name} needs a text; give its path as {key}"):
            check(settings(files, tasks=(name,), **{key: None}), materials)


def test_what_is_left_out_of_the_thirteen_is_said_in_a_line(files, materials) -> None:
    assert check(settings(files), materials) is None
    assert check(settings(files, tasks=("vt",)), materials) is None, "the others are left out by who names this one"
    some = settings(files, squad=None, lengths=(800, 2304))
    line = check(some, materials)
    said = re.fullmatch(r"ruler leaves out (.+): named in evals.ruler.tasks, each says what it lacks", line)[1].split(
        ", "
    )
    assert sorted([*said, *chosen(some, gather(some, materials))]) == sorted(RULER_TASKS)
    assert {"vt", "cwe", "qa_1"} <= set(said)


def test_unnamed_tasks_are_asked_where_every_length_has_room(files, materials) -> None:
    """The same tasks at each length, or an average would compare different things."""
    table = settings(files, lengths=(800, 2304))
    names = chosen(table, gather(table, materials))
    assert 0 < len(names) < 13 and "vt" not in names and "niah_single_1" in names
    cells = run(Teller([], text_of), table.model_copy(update={"generate": False}), materials, seed=0)
    averages = [cell for cell in cells if cell.task == "ruler/average"]
    assert [cell.extra["tasks"] for cell in averages] == [len(names)] * 2
    with pytest.raises(
        Refusal, match=r"evals.ruler.lengths=300 does not fit: the smallest prompts of niah_single_1 take about \d+"
    ):
        check(settings(files, lengths=(300, 2304)), materials)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("niah_singel_1",)}, "did you mean 'niah_single_1'"),
        ({"haystack_file": "x"}, "give one"),
        ({"lengths": (2304, 2304)}, "twice"),
        ({"tasks": ("vt", "vt")}, "twice"),
        ({"lengths": ()}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(files, changes, message) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(files, **changes)


def test_the_suites_seed_changes_no_question(files, materials, models) -> None:
    asked = settings(files, tasks=("niah_single_1",), samples=1, lengths=(600,))
    one, other = (run(models.RandomModel(), asked, materials, seed=seed)[0] for seed in (0, 1))
    assert one == other != run(models.RandomModel(), asked.model_copy(update={"seed": 7}), materials, seed=0)[0]
