"""Where documents come from: packages joined in path order, duplicates dropped, and bad files refused by name."""

import gzip
import json
from pathlib import Path

import pytest

from data.corpus import Document, PythonDocuments, local_python, text_documents
from settings import Refusal

GZIPPED = gzip.compress(json.dumps({"text": "words " * 50}).encode())


def made(root: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


def test_packages_are_joined_and_duplicates_dropped(tmp_path: Path) -> None:
    library = made(
        tmp_path / "library",
        {
            "json/encoder.py": b"encoder",
            "json/decoder.py": b"decoder\n",
            "json/deep/inner.py": b"inner\n",
            "json/tests/test_json.py": b"left out",
            "test/test_all.py": b"left out",
            "site-packages/theirs.py": b"left out",
            "abc.py": b"abc\n",
            "copy.py": b"abc\n",
            "latin.py": b"\xe9",
            "notes.txt": b"no code",
        },
    )
    torch_folder = made(
        tmp_path / "torch", {"nn/linear.py": b"linear\n", "nn/twin.py": b"encoder", "random.py": b"r\n"}
    )
    documents = {document.name: document.text for document in PythonDocuments(library, torch_folder)}
    assert documents == {
        "abc.py": b"abc\n",
        "json": b"decoder\ninner\nencoder\n",
        "torch/nn": b"linear\n",
        "torch/random.py": b"r\n",
    }


def test_recipe_follows_the_files(tmp_path: Path) -> None:
    library = made(tmp_path / "a", {"x.py": b"x"})
    before = PythonDocuments(library, tmp_path).recipe
    assert PythonDocuments(library, tmp_path).recipe == before
    made(library, {"y.py": b"y"})
    assert PythonDocuments(library, tmp_path).recipe != before


def test_this_machine_has_code() -> None:
    documents = local_python()
    assert "torch" in documents.description
    with pytest.raises(Refusal, match=r"hold no \.py files"):
        PythonDocuments(Path("/proc/self/fdinfo"), Path("/proc/self/fdinfo"))


def test_every_kind_of_text_file(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("eins", "", "zw\u00f6lf"))
    made(tmp_path, {"a.txt": b"one", "deep/b.md": b"two", "c.jsonl": lines + b"\n", "d.bin": b"\xff", "e.txt": b" \n"})
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines))
    documents = text_documents(tmp_path)
    expected = [
        Document("a.txt", "a.txt", b"one"),
        Document("c.jsonl:1", "c.jsonl:1", b"eins"),
        Document("c.jsonl:3", "c.jsonl:3", "zw\u00f6lf".encode()),
        Document("deep/b.md", "deep/b.md", b"two"),
        Document("f.jsonl.gz:1", "f.jsonl.gz:1", b"eins"),
        Document("f.jsonl.gz:3", "f.jsonl.gz:3", "zw\u00f6lf".encode()),
    ]
    assert list(documents) == expected
    assert list(documents) == expected  # and again
    assert [document.text for document in text_documents(tmp_path / "a.txt")] == [b"one"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None, "three"]}), tmp_path / "x.parquet")
    assert [document.text for document in text_documents(tmp_path)] == [b"one", b"three"]
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(Refusal, match=r"x\.parquet: row 1: 'text' must be a string, it is int"):
        list(text_documents(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(Refusal, match=r"x\.parquet: is not Parquet, or damaged"):
        list(text_documents(tmp_path))


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"a.txt": b"good \xff bad"}, r"a\.txt: not UTF-8 at byte 5 \(0xff\)"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": "\xe9"}\n'}, r"a\.jsonl: not UTF-8 at byte 24 \(0xe9\)"),
        ({"a.jsonl": b'{"text": "x"}\n{"body": "x"}\n'}, r"a\.jsonl: line 2 is not an object with a \"text\""),
        ({"a.jsonl": b"[1]\n"}, r"a\.jsonl: line 1 is not an object"),
        ({"a.jsonl": b'{"text": 3}\n'}, r"line 1: \"text\" must be a string, it is int"),
        ({"a.txt": b"", "b.md": b"\n \n"}, "is empty; give text to train on"),
        ({"a.jsonl.gz": b"no gzip"}, r"a\.jsonl\.gz: is not gzip, or cut short"),
        ({"a.jsonl.gz": GZIPPED[:-20]}, r"a\.jsonl\.gz: is not gzip, or cut short"),
        ({"a.jsonl.gz": GZIPPED[:10] + b"\xff" * 40}, r"a\.jsonl\.gz: is not gzip, or cut short"),
        ({"a.jsonl": b'{"text": "x", "n": ' + b"1" * 5000 + b"}\n"}, r"a\.jsonl: line 1 is not an object"),
        ({"a.jsonl": b"[" * 200_000 + b"\n"}, r"a\.jsonl: line 1 is not an object"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, files: dict[str, bytes], match: str) -> None:
    made(tmp_path, files)
    with pytest.raises(Refusal, match=match):
        list(text_documents(tmp_path))


def test_missing_text_is_refused(tmp_path: Path) -> None:
    made(tmp_path, {"books.txt": b"x", "picture.png": b"x"})
    with pytest.raises(Refusal, match=r"book\.txt: no such file or folder; did you mean 'books\.txt'\?"):
        text_documents(tmp_path / "book.txt")
    with pytest.raises(Refusal, match=r"picture\.png: holds no text that can be read; known kinds of file: \.txt"):
        text_documents(tmp_path / "picture.png")
