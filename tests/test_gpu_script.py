"""The script of all that has to be seen on a GPU: goes on where it stopped, and names only commands that exist."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import PYTHON, ROOT, Step, run, steps


def test_a_step_that_failed_is_tried_again_and_others_are_not(tmp_path: Path) -> None:
    count = tmp_path / "count"
    tell = f"open({str(count)!r}, 'a').write('x')"
    good = Step("good", (PYTHON, "-c", tell), 1)
    bad = Step("bad", (PYTHON, "-c", f"{tell}; print('broken'); raise SystemExit(3)"), 1)
    assert run([good, bad], tmp_path, None) == ["bad"]
    assert run([good, bad], tmp_path, 1.0) == ["bad"]
    assert count.read_text() == "xxx"
    told = json.loads((tmp_path / "steps.json").read_text())
    assert told["good"]["status"] == 0 and told["bad"]["status"] == 3
    assert "broken" in (tmp_path / "bad.log").read_text()


def test_what_takes_too_long_is_ended_and_what_would_is_not_begun(tmp_path: Path) -> None:
    slow = Step("slow", (PYTHON, "-c", "import time; time.sleep(60)"), 0.005)
    assert run([slow], tmp_path, None) == ["slow"]
    assert json.loads((tmp_path / "steps.json").read_text())["slow"]["status"] == 124
    ok = Step("ok", (PYTHON, "-c", "import time; time.sleep(1.5)"), 1)
    assert run([ok, Step("later", ok.words, 1)], tmp_path, 0.05) == []
    assert "later" not in json.loads((tmp_path / "steps.json").read_text())


@pytest.mark.parametrize("step", steps("shards"), ids=lambda step: step.name)
def test_its_commands_exist(step: Step) -> None:
    files = [word for word in step.words[1:] if word.endswith((".toml", ".py"))]
    assert all((ROOT / file).is_file() for file in files), files
    if step.words[1] == "-m" and step.words[2].startswith("benchmarks."):
        flags = {word for word in step.words if word.startswith("--")}
        text = (ROOT / (step.words[2].replace(".", "/") + ".py")).read_text()
        assert all(f'"{flag}"' in text for flag in flags)
    assert step.words[0] == sys.executable
