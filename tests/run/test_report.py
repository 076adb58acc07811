"""A report copes with whatever a run has left behind, and says what its files say."""

import base64
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from run import page, sections, sections_reach
from run import report as room
from run.__main__ import main
from run.facts import read_run
from run.figures import smooth
from run.report import cards, status, write_report
from settings import Refusal

STAGE = '[[context.stages]]\nuntil_tokens = {}\nsequence_length = {}\nrotary = {{ kind = "yarn", factor = 4.0 }}\n'
MOE = {"balance_loss": 1.1, "router_z_loss": 0.2, "max_violation": 0.5, "dead_experts": 0, "router_entropy": 0.9}


class Page(HTMLParser):
    """Counts tags and remembers what pictures show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.alts: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        for key, value in attributes:
            if key in ("src", "srcset", "href"):
                self.sources.append(value or "")
            if key == "alt":
                self.alts.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built but not painted, which takes most of a report's time."""
    monkeypatch.setattr(page, "png", lambda figure: b"\x89PNG" + bytes(len(figure.axes)))
    monkeypatch.setattr(sections.heatmap, "png", lambda grids, *_: b"\x89PNG" + bytes(len(grids)))
    monkeypatch.setattr(sections_reach, "to_png", lambda figure: b"\x89PNG" + bytes(len(figure.axes)))


def make_run(
    folder: Path,
    *,
    lengths: tuple[int, ...] = (128, 512),
    tokens: int = 2000,
    has_evals: bool = True,
    has_moe: bool = True,
    steps: int = 40,
) -> Path:
    """A run of 1000 tokens a stage, 50 a step, read until `tokens`; scores grow with the stage."""
    folder.mkdir(parents=True, exist_ok=True)
    total = 1000 * len(lengths)
    stages = "".join(STAGE.format(1000 * (index + 1), length) for index, length in enumerate(lengths))
    config = f'name = "tiny <run> & more"\ntotal_tokens = {total}\ntokens_per_step = 50\n{stages}'
    (folder / "config.toml").write_text(config)
    (folder / "environment.json").write_text(
        json.dumps({"machine": "a <machine>", "parameters": {"total": 9000, "active": 3000}})
    )
    rows, evals = [], []
    for step in range(1, tokens // 50 + 1):
        stage = (step * 50 - 1) // 1000
        row = {"step": step, "tokens": step * 50, "stage": stage, "sequence_length": lengths[stage], "loss": 5 / step}
        row |= {"learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 25.0, "peak_memory_bytes": 2**30}
        rows.append(row | (MOE if has_moe else {}))
        if has_evals and step % 10 == 0:
            evals += cells(step, stage, lengths)
    for name, content in (("metrics.jsonl", rows), ("evals.jsonl", evals)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def cells(step: int, stage: int, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    stamp = {"step": step, "tokens": step * 50, "count": 4}
    rows: list[dict[str, Any]] = []
    for length in lengths:
        score = 1.0 if length <= lengths[stage] else 0.25
        rows += [stamp | {"task": "needle", "length": length, "depth": depth, "score": score} for depth in (0.0, 1.0)]
        rows.append(stamp | {"task": "held_out/web", "length": length, "depth": None, "score": 2.0 + stage})
    for start in (0, 64):
        bucket = {"start": start, "stop": start + 64, "length": 128, "depth": None, "score": 2.5}
        rows.append(stamp | {"task": "positions/web"} | bucket)
    loads = {"layer": 0, "load_0": 0.25, "load_1": 0.75}
    return [*rows, stamp | {"task": "routing/web", "length": 128, "depth": None, "score": 0.8} | loads]


def page_of(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_the_page_is_whole_and_carries_everything_inside(tmp_path: Path) -> None:
    html, page = page_of(make_run(tmp_path, tokens=1050))
    assert page.open == [], "a tag was left open"
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    for source in page.sources:
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    assert "<script" not in html and "http" not in html
    assert page_of(tmp_path)[0] == html, "the same run must give the same page"
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.usefixtures("blank_pictures")
def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    html, _ = page_of(make_run(tmp_path))
    assert "tiny &lt;run&gt; &amp; more" in html and "a &lt;machine&gt;" in html and "<run>" not in html


@pytest.mark.usefixtures("blank_pictures")
def test_each_section_appears_exactly_when_there_are_numbers_for_it(tmp_path: Path) -> None:
    everything, _ = page_of(make_run(tmp_path / "all"))
    no_evals, _ = page_of(make_run(tmp_path / "a", has_evals=False))
    dense, _ = page_of(make_run(tmp_path / "b", has_evals=False, has_moe=False))
    titles = ["Needle in a haystack", "Training", "Held-out text", "Loss by position", "Experts", "Schedule and speed"]
    assert [title for title in titles if f"<h2>{title}</h2>" in everything] == titles
    assert [title for title in titles if f"<h2>{title}</h2>" in no_evals] == [
        "Training",
        "Experts",
        "Schedule and speed",
    ]
    assert [title for title in titles if f"<h2>{title}</h2>" in dense] == ["Training", "Schedule and speed"]


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("tokens", [0, 50, 450, 1000, 1500, 2000])
@pytest.mark.parametrize("lengths", [(128, 512), (64, 128, 256)])
def test_a_run_stopped_anywhere_gives_a_report(tmp_path: Path, tokens: int, lengths: tuple[int, ...]) -> None:
    folder = make_run(tmp_path, tokens=tokens, lengths=lengths)
    _, page = page_of(folder)
    assert page.open == []
    told = status(read_run(folder))
    assert ("Complete" in told) == (tokens == 1000 * len(lengths))


def test_a_folder_with_a_configuration_alone_gives_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("total_tokens = 10\n")
    html, page = page_of(tmp_path)
    assert page.open == [] and "Nothing measured yet" in html and tmp_path.name in html


@pytest.mark.usefixtures("blank_pictures")
def test_numbers_that_are_not_there_do_not_hurt(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for name in ("metrics.jsonl", "evals.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for row in rows:
            row.update({key: None for key in row if key in ("loss", "score", "gradient_norm", "tokens_per_second")})
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "tok')
    _, page = page_of(folder)
    assert page.open == []


def test_the_headlines_say_what_the_files_say(tmp_path: Path) -> None:
    told = {card.label: (card.before, card.value) for card in cards(read_run(make_run(tmp_path)))}
    assert told["needle found at length 128"] == ("100%", "100%")
    assert told["needle found at length 512"] == ("25%", "100%")
    assert told["bits per byte of held-out web, length 128"] == ("2.000", "3.000")
    assert told["tokens per second"] == ("", "25")
    assert told["training time"] == ("", "1:20")  # 2000 tokens at 25 a second
    assert told["parameters"] == ("", "9K") and told["peak memory"] == ("", "1.00 GiB")


def test_before_is_the_end_of_the_first_stage_not_its_beginning(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    rows = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    for row in rows:  # an evaluation in the middle of each stage must not be taken for its end
        row["score"] = 0.0 if row["step"] in (10, 30) else row["score"]
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = read_run(folder)
    assert [(snapshot.step, snapshot.is_stage_end) for snapshot in facts.snapshots] == [(20, True), (40, True)]
    told = {card.label: (card.before, card.value) for card in cards(facts)}
    assert told["needle found at length 512"] == ("25%", "100%")


def test_skipped_steps_are_told_where_there_were_any(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert "steps skipped" not in {card.label for card in cards(read_run(folder))}
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, (count, reason) in zip(rows, [(2, "the loss is not finite"), (0, None), (1, "a spike")], strict=False):
        row |= {"skipped_steps": count} | ({"skip_reason": reason} if reason else {})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = {card.label: card for card in cards(read_run(folder))}["steps skipped"]
    assert (shown.value, shown.note) == ("3", "the loss is not finite; a spike")


def test_one_stage_has_no_before(tmp_path: Path) -> None:
    told = {card.label: card for card in cards(read_run(make_run(tmp_path, lengths=(128,), tokens=1000)))}
    assert told["needle found at length 128"].before == ""


@pytest.mark.usefixtures("blank_pictures")
def test_parameters_are_shown_where_the_run_wrote_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    shown = {card.label: card for card in room.cards(read_run(folder))}["parameters"]
    assert shown.value == "9K" and "3K active" in shown.note
    (folder / "environment.json").unlink()
    assert "parameters" not in {card.label for card in room.cards(read_run(folder))}


def test_the_load_over_time_has_a_row_for_each_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[list[float]], tuple[float, float]]] = []

    def catch(load_LE: list[list[float]], y_label: str, extent: tuple[float, float]) -> Figure:
        drawn.append((load_LE, extent))
        return Figure()

    monkeypatch.setattr(sections, "expert_load", catch)
    monkeypatch.setattr(page, "png", lambda figure: b"")
    pictures = list(sections._load_over_time(read_run(make_run(tmp_path))))
    assert len(pictures) == 1
    assert drawn == [([[0.25, 0.75]] * 4, (500, 2000))]


@pytest.mark.usefixtures("blank_pictures")
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refusal, match=r"config\.toml"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "refused" in capsys.readouterr().err
    make_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", "total_tokens = "),
        ("config.toml", "[[context.stages]]\nuntil_tokens = 5\n"),
        ("environment.json", '{"machine": '),
        ("environment.json", "[]"),
        ("metrics.jsonl", '{"loss": 1.0}\n'),
        ("evals.jsonl", '{"step": 1, "tokens": 1, "task": "needle"}\n'),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    (make_run(tmp_path) / name).write_text(content)
    with pytest.raises(Refusal, match=name.replace(".", r"\.")):
        read_run(tmp_path)


def test_a_smoothed_line_keeps_straight_lines_straight_and_skips_gaps() -> None:
    line = [3.0 - 0.5 * x for x in range(100)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([1.0, None, 1.0, None], share=1.0) == pytest.approx([1.0, 1.0, 1.0, math.nan], nan_ok=True)
    noisy = [(-1.0) ** x for x in range(100)]
    assert max(map(abs, smooth(noisy, share=0.2)[10:90])) < 0.2
