"""RULER as a task of the suite: which of the thirteen are asked, at which lengths, of which texts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import nn

from evals.intervals import bounds
from evals.lengths import DISTINCT, Length, Samples
from evals.questions import Answers, ask
from evals.ruler.haystack import held_out_essay, read_essay
from evals.ruler.matching import THRESHOLD, effective_length, weighted_average
from evals.ruler.reading import read_hotpotqa, read_squad
from evals.ruler.series import Series
from evals.ruler.tasks import RULER_TASKS, Ingredients, RulerTask
from evals.ruler.words import WordList, read_words
from evals.scoring import Cell, Materials, sources_of
from settings import Refusal, Section, nearest


class RulerSettings(Section):
    lengths: Annotated[tuple[Length, ...], DISTINCT] = Field(min_length=1)
    """Tokens of the prompt and of what is reserved for the answer, together. RULER: 4096 to 131072."""
    tasks: Annotated[tuple[str, ...], DISTINCT, Field(min_length=1)] | None = None
    """Which of the thirteen; left out, all that the given texts and every one of the lengths allow."""
    samples: Samples = 20
    """Samples of each task and length. RULER: 500."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """RULER's seed; samples are drawn from it alone, whatever `evals.seed` is."""
    generate: bool = True
    """Score what the model writes, as RULER does; false: teacher-forced exact match in its place, for a fraction of the
    time, comparable with nothing published."""
    haystack: str | None = None
    """A source whose held-out text is the essay; left out, the first that has some."""
    haystack_file: str | None = None
    """A text, or a JSON file with a `text`, that is the essay. RULER takes Paul Graham's, which carry no licence."""
    words: WordList = "own"
    """Which words keys and lists are made of; RULER: wonderwords."""
    squad: str | None = None
    """SQuAD 2.0's dev-v2.0.json, for qa_1."""
    hotpotqa: str | None = None
    """HotpotQA's hotpot_dev_distractor_v1.json, for qa_2."""

    @field_validator("tasks")
    @classmethod
    def check_tasks(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in tasks or ():
            if name not in RULER_TASKS:
                raise ValueError(f"unknown task {name!r}{nearest(name, list(RULER_TASKS))}")
        return tasks

    @model_validator(mode="after")
    def check_texts(self) -> "RulerSettings":
        if self.haystack is not None and self.haystack_file is not None:
            raise ValueError("haystack and haystack_file are two texts for one essay; give one")
        return self


def check(settings: RulerSettings, materials: Materials) -> str | None:
    """Refuse texts that are not there, and lengths that a task's smallest prompt does not fit; say which of the
    thirteen are left out, where the settings name none."""
    asked = chosen(settings, gather(settings, materials))
    left_out = [name for name in RULER_TASKS if name not in asked]
    if settings.tasks or not left_out:
        return None
    return f"ruler leaves out {', '.join(left_out)}: named in evals.ruler.tasks, each says what it lacks"


def run(model: nn.Module, settings: RulerSettings, materials: Materials, seed: int) -> list[Cell]:
    """A cell `ruler/TASK` for each task and length, and `ruler/average` over the tasks of each length; of several
    lengths together `ruler/weighted_increasing`, `ruler/weighted_decreasing` and `effective_length/ruler`, in tokens.

    Score: string_match_all (qa: string_match_part) of what the model wrote; extra `mean_length`, what prompts and
    their reserve came to, beside what questions.Answers.cell tells; of an average `tasks`, how many.
    """
    given = gather(settings, materials)
    names = chosen(settings, given)
    cells: list[Cell] = []
    averages: dict[int, float] = {}
    for length in settings.lengths:
        of_tasks = []
        for name in names:
            questions = Series(name, length, settings.seed, given).questions(settings.samples)
            answers = ask(model, materials, questions, writes=settings.generate)
            score_S = scores(RULER_TASKS[name], answers)
            cell = answers.cell(f"ruler/{name}", length, score_S=score_S if settings.generate else None, seed=seed)
            mean_length = fmean(question.size for question in questions)
            cells.append(replace(cell, extra={**cell.extra, "mean_length": mean_length}))
            of_tasks.append(score_S)
        # Samples of different tasks have nothing to do with each other: any pairing of them spreads as the mean does.
        average_S = np.mean(of_tasks, axis=0)
        averages[length] = float(average_S.mean())
        extra = {"tasks": len(names), **bounds(average_S, seed)}
        cells.append(Cell("ruler/average", length, None, averages[length], len(average_S), extra))
    return cells + over_lengths(averages)


def over_lengths(averages: Mapping[int, float]) -> list[Cell]:
    """What the averages of several lengths say together; at the longest of them."""
    if len(averages) == 1:
        return []
    longest, count = max(averages), len(averages)
    weighted = {
        name: weighted_average(averages, increasing=name == "increasing") for name in ("increasing", "decreasing")
    }
    return [
        *(Cell(f"ruler/weighted_{name}", longest, None, score, count) for name, score in weighted.items()),
        Cell("effective_length/ruler", longest, None, effective_length(averages), count, {"threshold": THRESHOLD}),
    ]


def scores(task: RulerTask, answers: Answers) -> np.ndarray:
    """The score of each question: by what was written, or where nothing was, by teacher forcing."""
    if answers.written is None:
        return answers.led.is_exact_S.astype(np.float64)
    pairs = zip(answers.texts, answers.questions, strict=True)
    return np.array([task.match(text, question.references) for text, question in pairs])


def gather(settings: RulerSettings, materials: Materials) -> Ingredients:
    """The texts that the settings name. Raises Refusal where one cannot be read."""
    essay: Sequence[str] | None = None
    if settings.haystack_file is not None:
        essay = read_essay(Path(settings.haystack_file))
    elif settings.haystack is not None or materials.held_out:
        names = [] if settings.haystack is None else [settings.haystack]
        source = sources_of(materials, names, "evals.ruler.haystack")[0]
        essay = held_out_essay(materials, source, max(settings.lengths))
    return Ingredients(
        tokenizer=materials.tokenizer,
        words=read_words(settings.words),
        essay=essay,
        squad=None if settings.squad is None else read_squad(Path(settings.squad)),
        hotpotqa=None if settings.hotpotqa is None else read_hotpotqa(Path(settings.hotpotqa)),
    )


def chosen(settings: RulerSettings, given: Ingredients) -> list[str]:
    """The tasks to ask: those named, or all that the texts and every length allow, so that averages are over the same.

    Raises Refusal where a named task cannot be asked, or none can.
    """
    reasons = {name: refusal_of(settings, given, name) for name in settings.tasks or RULER_TASKS}
    possible = [name for name, reason in reasons.items() if reason is None]
    refused = [reason for reason in reasons.values() if reason is not None]
    if refused and (settings.tasks or not possible):
        raise refused[0]
    return possible


def refusal_of(settings: RulerSettings, given: Ingredients, name: str) -> Refusal | None:
    """Why a task cannot be asked; None if it can."""
    needs = RULER_TASKS[name].needs
    if needs is not None and not getattr(given, needs):
        way_out = "a source with held-out text, or haystack_file" if needs == "essay" else f"its path as {needs}"
        return Refusal(f"evals.ruler.tasks: {name} needs a text; give {way_out}")
    try:
        for length in settings.lengths:
            Series(name, length, settings.seed, given).check(settings.samples)
    except Refusal as refusal:
        return refusal
    return None
