"""docs/huggingface.md names every architecture, in the order they are tried."""

import re
from pathlib import Path

from model.huggingface.architectures import ARCHITECTURES


def test_the_table_is_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [one.name for one in ARCHITECTURES]
