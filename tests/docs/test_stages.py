"""What docs/stages.md says: every key is told, its drawing is what is trained, and its numbers are the recipes'."""

import re
import tomllib
from pathlib import Path

from context.rotary import DefaultRotary
from context.stage_settings import StageSettings
from context.stages import Stages
from settings import validate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "stages.md").read_text()
STEP = 4096


def test_every_key_is_told_and_no_other() -> None:
    section = PAGE.partition("## The keys")[2].partition("## Growth")[0]
    told = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, flags=re.MULTILINE)
    assert {name for name, _ in told} == set(StageSettings.model_fields)
    needed = {name for name, field in StageSettings.model_fields.items() if field.is_required()}
    assert {name for name, left_out in told if left_out == "needed"} == needed
    for name, left_out in told:
        default = StageSettings.model_fields[name].get_default()
        kind = getattr(default, "kind", default)
        if left_out.startswith("`") and isinstance(kind, str):
            assert left_out == f"`{kind}`", name


def test_growth_is_drawn_as_it_is_trained() -> None:
    drawing = PAGE.partition("```text\n")[2].partition("```")[0]
    blocks = [block.splitlines() for block in drawing.strip().split("\n\n")]
    assert len(blocks) == 3
    for title, *lines in (block for block in blocks):
        growth, length, steps = re.fullmatch(r"(\{.*\}) +sequence_length = (\d+), (\d+) steps", title.strip()).groups()
        table = {
            "until_tokens": int(steps) * STEP,
            "sequence_length": int(length),
            "rotary": DefaultRotary(base=1e4).model_dump(),
            "growth": tomllib.loads(f"growth = {growth}")["growth"],
        }
        (stage,) = Stages([validate(table, StageSettings, "page")], STEP)
        planned = [stage.step(number) for number in range(stage.num_steps)]
        is_window = "window" in title
        told = [str((step.window or "all") if is_window else step.sequence_length) for step in planned]
        assert " ".join(lines).split() == told, title


def test_every_recipe_has_a_row() -> None:
    recipes = {path.stem for path in (ROOT / "configs" / "context" / "recipes").glob("*.toml")} - {"base"}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Recipes")[2], flags=re.MULTILINE)) == recipes
