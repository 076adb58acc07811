"""The commands: shards and tokenizers from text, one message and exit status 2 for what can be mended."""

from pathlib import Path

import pytest

from data.__main__ import main
from data.prepare import Prepared
from data.tokenizer import BpeTokenizer


def test_from_text_to_shards_with_a_tokenizer_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / f"text/{number}.txt").write_text(f"document {number}: " + "the same words again, " * 20)
    source, vocabulary, out = str(tmp_path / "text"), str(tmp_path / "t.json"), str(tmp_path / "out")
    assert main(["train-tokenizer", source, vocabulary, "--vocab-size", "300"]) == 0
    assert main(["prepare", source, out, "--tokenizer", vocabulary, "--held-out", "0"]) == 0
    assert main(["verify", out]) == 0
    assert "every file is as it was prepared" in capsys.readouterr().out
    prepared = Prepared(Path(out), BpeTokenizer(Path(vocabulary)))
    assert prepared.train.num_documents == 40


@pytest.mark.parametrize(
    "arguments",
    [["prepare", "nowhere", "out"], ["verify", "nowhere"], ["prepare", ".", "out", "--tokenizer", "nope.json"]],
)
def test_what_can_be_mended_ends_with_two(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.strip().splitlines()) == 1
