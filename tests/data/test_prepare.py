"""Prepared folders: train and held out are disjoint, whole or absent, reused or refused, never silently another."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data.corpus import Document, text_documents
from data.prepare import prepare, prepare_or_reuse, survey
from data.prepared import Prepared, verify
from data.tokenizer import ByteTokenizer, train_bpe
from settings import Refusal

BYTES = ByteTokenizer()


@dataclass
class Listed:
    """Documents from a list."""

    texts: dict[str, bytes]
    description: str = "a list"
    licence: str = "none"
    recipe: str = "list"

    def __iter__(self) -> Iterator[Document]:
        return iter([Document(name, name.split("/")[0], text) for name, text in self.texts.items()])


def words(seed: int, count: int) -> bytes:
    rng = np.random.default_rng(seed)
    return b" ".join(b"w%d" % number for number in rng.integers(0, 5000, size=count)) + b"\n"


def many(count: int = 200) -> dict[str, bytes]:
    return {f"package{number}/a.py": words(number, 40 + number) for number in range(count)}


def texts_of(folder: Path, split: str) -> list[bytes]:
    shard = getattr(Prepared(folder, BYTES), split)
    documents = [shard.document(number) for number in range(shard.num_documents)]
    assert all(document[-1] == BYTES.end_of_text for document in documents)
    return [BYTES.decode(document).encode() for document in documents]


def test_every_document_goes_to_one_side(tmp_path: Path) -> None:
    texts = many()
    manifest = prepare(Listed(texts), BYTES, tmp_path / "out", 0.1)
    train, held_out = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "held_out")
    assert sorted(train + held_out) == sorted(texts.values())
    assert 0.05 < manifest["splits"]["held_out"]["bytes"] / sum(map(len, texts.values())) <= 0.1
    assert manifest["splits"]["train"]["tokens"] == sum(len(text) + 1 for text in train)
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_packages_are_never_torn() -> None:
    texts = {f"p{number % 40}/{number}.py": words(number, 50) for number in range(400)}
    held_out = survey(Listed(texts), 0.1).held_out
    packages = {name.split("/")[0] for number, name in enumerate(texts) if number in held_out}
    assert packages
    assert held_out == {number for number, name in enumerate(texts) if name.split("/")[0] in packages}


def test_split_does_not_hang_on_order() -> None:
    texts = many()
    names = list(texts)
    chosen = {names[number] for number in survey(Listed(texts), 0.1).held_out}
    backwards = dict(reversed(texts.items()))
    assert {list(backwards)[number] for number in survey(Listed(backwards), 0.1).held_out} == chosen


def test_exact_duplicates_are_dropped(tmp_path: Path) -> None:
    texts = many(50)
    manifest = prepare(Listed(texts | {"copy": texts["package3/a.py"]}), BYTES, tmp_path / "out", 0.0)
    assert manifest["duplicates"] == 1
    assert manifest["splits"]["train"]["documents"] == 50
    assert manifest["splits"]["held_out"]["tokens"] == 0


def test_held_out_text_inside_training_text_is_thrown_away(tmp_path: Path) -> None:
    texts = {name: text * 1 for name, text in many(100).items()}
    held_out = [list(texts)[number] for number in survey(Listed(texts), 0.1).held_out]
    victim = max(held_out, key=lambda name: len(texts[name]))
    # A training document that quotes it whole; its package must not be chosen itself.
    host = next(name for name in reversed(texts) if name not in held_out)
    texts[host] = texts[host][:-1] + b" " + texts[victim]
    manifest = prepare(Listed(texts), BYTES, tmp_path / "out", 0.1)
    assert [one["name"] for one in manifest["contained"]] == [victim]
    assert texts[victim] not in texts_of(tmp_path / "out", "held_out")
    assert texts[victim] not in texts_of(tmp_path / "out", "train")
    assert texts[host] in texts_of(tmp_path / "out", "train")


def test_the_manifest_says_how_much_of_what_was_kept_is_contained(tmp_path: Path) -> None:
    texts = {name: words(number, 400) for number, name in enumerate(many(100))}
    held_out = [list(texts)[number] for number in sorted(survey(Listed(texts), 0.1).held_out)]
    victim = held_out[0]
    host = next(name for name in reversed(texts) if name not in held_out)
    # 33 words are 21 runs of 13 words, of 388 in all.
    texts[host] = texts[host][:-1] + b" " + b" ".join(texts[victim].split()[:33])
    manifest = prepare(Listed(texts), BYTES, tmp_path / "out", 0.1)
    assert manifest["contained"] == []
    kept = len(held_out)
    assert manifest["splits"]["held_out"]["contained_share"] == pytest.approx(21 / 388 / kept, rel=0.05)


def test_short_repetitive_and_empty_of_words_is_never_held_out_unseen(tmp_path: Path) -> None:
    texts = many(100) | {f"short{number}": b"def main(): %s" % (b"pass " * (number + 1)) for number in range(100)}
    prepare(Listed(texts), BYTES, tmp_path / "out", 0.3)
    train = b"\n".join(texts_of(tmp_path / "out", "train"))
    held_out = texts_of(tmp_path / "out", "held_out")
    assert held_out
    assert not [text for text in held_out if text.strip() in train]


def test_nothing_left_to_hold_out_is_refused(tmp_path: Path) -> None:
    texts = {f"p{number}": b"the same words again and again " * (number + 3) for number in range(40)}
    with pytest.raises(
        Refusal, match=r"a list: all \d+ documents that were to be held out were discarded.*held_out = 0"
    ):
        prepare(Listed(texts), BYTES, tmp_path / "out", 0.1)
    assert not (tmp_path / "out").exists()
    assert prepare(Listed(texts), BYTES, tmp_path / "out", 0.0)["splits"]["train"]["documents"] == 40


def test_an_empty_folder_is_filled_and_another_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _, is_new = prepare_or_reuse(Listed(many(9)), BYTES, tmp_path / "out", 0.1)
    assert is_new
    _, is_new = prepare_or_reuse(Listed(many(9)), BYTES, tmp_path / "out", 0.1)
    assert not is_new
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(Refusal, match=r"mine: holds files but no manifest\.json.*remove this one"):
        prepare(Listed(many(9)), BYTES, tmp_path / "mine", 0.1)
    assert (tmp_path / "mine/letter.txt").exists()


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out.partial-123").mkdir()
    (tmp_path / "out.partial-123/train.bin").write_bytes(b"x")
    (tmp_path / "other.partial-123").mkdir()
    prepare(Listed(many(9)), BYTES, tmp_path / "out", 0.1)
    assert not (tmp_path / "out.partial-123").exists()
    assert (tmp_path / "other.partial-123").exists()


@pytest.mark.parametrize("key", ["source", "splits", "duplicates", "contained", "recipe", "tokenizer"])
def test_a_manifest_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    manifest = prepare(Listed(many(9)), BYTES, tmp_path / "out", 0.1)
    for damaged in ({name: fact for name, fact in manifest.items() if name != key}, manifest | {key: []}, []):
        if damaged == manifest:
            continue
        (tmp_path / "out/manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(Refusal, match=r"manifest\.json: is damaged .*; remove .*out and prepare it anew"):
            verify(tmp_path / "out")


def test_one_long_document_is_cut_at_a_line(tmp_path: Path) -> None:
    text = b"".join(words(number, 20) for number in range(300))
    prepare(Listed({"book": text}), BYTES, tmp_path / "out", 0.1)
    (train,), (held_out,) = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "held_out")
    assert train + held_out == text
    assert train.endswith(b"\n")
    assert len(held_out) / len(text) == pytest.approx(0.1, abs=0.02)


def test_one_long_line_is_cut_between_letters(tmp_path: Path) -> None:
    text = "ä".encode() * 5001
    prepare(Listed({"line": b"x" + text}), BYTES, tmp_path / "out", 0.1)
    train, held_out = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "held_out")
    assert train[0] + held_out[0] == b"x" + text
    assert held_out[0].decode() == "ä" * (len(held_out[0]) // 2)


def test_same_recipe_is_reused_and_another_refused(tmp_path: Path) -> None:
    first = prepare(Listed(many()), BYTES, tmp_path / "out", 0.1)
    stamp = (tmp_path / "out/train.bin").stat().st_mtime_ns
    assert prepare(Listed(many()), BYTES, tmp_path / "out", 0.1) == first
    assert (tmp_path / "out/train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(Refusal, match="was prepared from other text, another tokenizer or another held-out share"):
        prepare(Listed(many()), BYTES, tmp_path / "out", 0.2)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_bytes(b"good")
    (tmp_path / "text/b.txt").write_bytes(b"\xff")
    with pytest.raises(Refusal, match="not UTF-8"):
        prepare(text_documents(tmp_path / "text"), BYTES, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_changed_or_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    prepare(Listed(many()), BYTES, folder, 0.1)
    before = Prepared(folder, BYTES).fingerprint
    with pytest.raises(Refusal, match="was prepared with another tokenizer"):
        Prepared(folder, train_bpe(["some text"], 260, tmp_path / "t.json"))
    data = bytearray((folder / "train.bin").read_bytes())
    data[100] ^= 1
    (folder / "train.bin").write_bytes(data)
    for check in (lambda: Prepared(folder, BYTES), lambda: verify(folder)):
        with pytest.raises(Refusal, match=r"train\.bin: was changed after it was prepared"):
            check()
    data[100] ^= 1
    (folder / "train.bin").write_bytes(data)
    assert Prepared(folder, BYTES).fingerprint == before
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(Refusal, match=r"manifest\.json: is damaged"):
        Prepared(folder, BYTES)
    with pytest.raises(Refusal, match=r"holds no manifest\.json; make it with"):
        Prepared(tmp_path / "nowhere", BYTES)


def test_impossible_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"held_out=1\.5 must be a share"):
        prepare(Listed(many(3)), BYTES, tmp_path / "out", 1.5)
