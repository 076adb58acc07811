"""The configurations that docs/data.md shows are ones."""

import re
import tomllib
from pathlib import Path

from context.stage_settings import StageSettings
from data.batches import DataSettings
from settings import validate

PAGE = Path(__file__).parents[2] / "docs/data.md"


def test_its_tables_are_read_as_they_stand() -> None:
    first, second = (tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL))
    (stage,) = first["context"]["stages"]
    read = validate(stage, StageSettings, "docs/data.md")
    assert [bucket.share for bucket in read.buckets["books"]] == [0.5, 0.2] and read.positions.kind == "pose"
    data = validate(second["data"], DataSettings, "docs/data.md")
    assert data.tokenizer.kind == "integers" and set(data.sources) == {"heads"}
