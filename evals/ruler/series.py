"""The questions of one task at one length, each as long as its haystack can make it."""

from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

from evals.lengths import check_lengths
from evals.questions import Question
from evals.ruler.fill import Maker, fill
from evals.ruler.tasks import RULER_TASKS, Ingredients, RulerTask
from settings import Refusal


@dataclass(frozen=True)
class Series:
    """Question n is a pure function of the seed, the texts, the task, the length and n."""

    name: str
    length: int
    """Tokens of a prompt and of what is reserved for its answer, together and at most."""
    seed: int
    given: Ingredients

    @property
    def task(self) -> RulerTask:
        return RULER_TASKS[self.name]

    @cached_property
    def maker(self) -> Maker:
        return self.task.maker(self.given, self.length)

    def make(self, number: int, size: int) -> Question:
        """Question `number` with so much haystack, whatever its length."""
        sample = self.maker.make(Random(f"{self.seed} {self.name} {self.length} {number}"), number, size)
        return Question.of_text(
            self.given.tokenizer,
            sample.prompt,
            sample.answer,
            references=sample.references,
            max_new_tokens=self.task.template.max_new_tokens,
            name=f"evals.ruler: {self.name}",
        )

    def check(self, count: int) -> None:
        """Refuse what `questions` would refuse; makes the smallest prompts alone."""
        try:
            least = max(self.make(number, self.maker.smallest).size for number in range(count))
        except Refusal as refusal:
            raise Refusal(f"evals.ruler: {self.name} cannot be asked: {refusal}") from None
        why = f"the smallest prompts of {self.name} take about {least} tokens, with room for the answer"
        check_lengths("evals.ruler.lengths", [self.length], least, why)

    def questions(self, count: int) -> list[Question]:
        """The first so many. Raises Refusal where one cannot be made to fit."""
        self.check(count)
        size, made = 2 * self.maker.smallest, []
        for number in range(count):
            size = self.fill(number, guess=size)
            made.append(replace(self.make(number, size), length=self.length))
        return made

    def fill(self, number: int, guess: int) -> int:
        """How much haystack question `number` takes."""
        maker = self.maker
        return fill(lambda size: self.make(number, size).size, self.length, maker.smallest, maker.largest, guess)
