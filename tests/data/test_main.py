"""The commands: shards and tokenizers from text, one message and exit status 2 for what can be mended."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import data.prepare
from data.__main__ import main
from data.prepared import Prepared
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


def test_lengths_of_documents_are_told_by_powers_of_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the token that ends each: one text of 4 tokens, one of 7, one of 16."""
    (tmp_path / "text").mkdir()
    for number, length in enumerate((3, 6, 15)):
        (tmp_path / f"text/{number}.txt").write_text(str(number) * length)
    assert main(["prepare", str(tmp_path / "text"), str(tmp_path / "out"), "--held-out", "0"]) == 0
    capsys.readouterr()
    assert main(["lengths", str(tmp_path / "out")]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("out: 3 documents of 9 tokens on average")
    assert [row.split() for row in rows] == [
        ["1", "3", "100.0%"],
        ["2", "3", "100.0%"],
        ["4", "3", "100.0%"],
        ["8", "1", "59.3%"],
        ["16", "1", "59.3%"],
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "nowhere", "out"],
        ["verify", "nowhere"],
        ["lengths", "nowhere"],
        ["prepare", ".", "out", "--tokenizer", "nope.json"],
    ],
)
def test_what_can_be_mended_ends_with_two(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.strip().splitlines()) == 1
    assert output.err.startswith("refused: ")


def test_a_tokenizer_is_not_written_over_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "out").mkdir()
    assert main(["train-tokenizer", str(tmp_path / "a.txt"), str(tmp_path / "out"), "--vocab-size", "260"]) == 2
    assert "out: is a folder; name the file to write" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "out"}


def test_an_interrupt_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.setattr("data.prepare.Split.add", interrupt)
    assert main(["prepare", str(tmp_path / "a.txt"), str(tmp_path / "out")]) == 130
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".out.lock"}


def test_speed_is_told_only_by_who_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one line of text")
    command = ["prepare", str(tmp_path / "a.txt"), str(tmp_path / "out"), "--held-out", "0"]
    lock = data.prepare._locked

    @contextmanager
    def waited(folder: Path) -> Iterator[None]:
        monkeypatch.setattr("data.prepare._locked", lock)
        assert main(command) == 0  # another process, while this one waits
        assert "MB/s" in capsys.readouterr().out
        with lock(folder):
            yield

    monkeypatch.setattr("data.prepare._locked", waited)
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "was there already" in output
    assert "MB/s" not in output
