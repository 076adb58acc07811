"""What is predicted of published runs: how far it is off is told beside each, and moves for a reason only."""

import tomllib

import pytest

from benchmarks.published import DEVICES, FILE, Comparison, comparisons, main, shown
from planning.outlook import table

EVERY = list(comparisons())


@pytest.mark.parametrize("each", EVERY, ids=[each.row["name"] for each in EVERY])
def test_how_far_off_is_as_told(each: Comparison) -> None:
    """A row whose number moves is to be told anew, in published.toml and docs/planning.md, with the reason."""
    assert round(100 * each.error) == each.row["told"]
    assert 0 < each.predicted.utilization < 0.8


def is_moe(each: Comparison) -> bool:
    return "moe" in tomllib.loads(FILE.read_text())["models"][each.row["model"]]


def test_most_are_near_those_held_out_and_those_with_experts_too() -> None:
    held_out = [each for each in EVERY if each.is_held_out]
    assert len(EVERY) >= 40 and len(held_out) >= 5 * (len(EVERY) - len(held_out))
    assert sum(each.is_near for each in held_out if not is_moe(each)) >= 28
    assert sum(each.is_near for each in held_out if is_moe(each)) >= 5
    assert sum(each.is_near for each in EVERY) / len(EVERY) >= 0.9


def test_a_row_says_where_it_is_from_and_what_is_assumed() -> None:
    for each in EVERY:
        assert each.row["source"] and each.row["use"] in ("held out", "calibration")
        tokens = each.row["rows"] * each.row["length"] * each.row["microbatches"]
        assert each.predicted.tokens_of_rank <= tokens, "ranks of one pipeline share tokens"
    assert DEVICES["h100_500w"].peak < DEVICES["h100"].peak


def test_the_documents_show_the_table_as_it_is() -> None:
    text = (FILE.parents[1] / "docs" / "planning.md").read_text()
    for line in table([shown(each) for each in EVERY]):
        assert line in text


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["published"])
    main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(EVERY) + 3 and said[0].split()[:3] == ["run", "published", "predicted"]
    assert said[-1].startswith("within 25%: ")
    monkeypatch.setattr("sys.argv", ["published", "--parts", "DeepSeek-V3, 256"])
    main()
    assert "waiting in the pipeline" in capsys.readouterr().out
