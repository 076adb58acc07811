"""What stands beside a speed: model FLOPs of the documents of a step, padding, MFU, and the words for them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from attention.mask import Documents, Mask, Places
from data.batches import Batches
from model.size import flops_per_token as of_whole_rows
from run import record, report
from run.config import load_config, rows_of_step
from run.demand import demand_of
from run.speed import FORMULA, StepCounts, beside, counts_of, flops_per_token, padding_share, utilization

TINY = Path(__file__).parents[1] / "tiny.toml"
WINDOWED = ["model.pattern=['window', 'full']", "model.attention.window=9"]


def drawn_pairs(lengths: tuple[int, ...], padding_B: list[int], row_length: int, window: int | None) -> int:
    """Pairs of real tokens that the mask lets see each other, looked at one by one."""
    total, number = sum(lengths), np.arange(sum(lengths))
    document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    place = torch.from_numpy(number % row_length)
    is_real = (place < row_length - torch.tensor(padding_B)[torch.from_numpy(number // row_length)]).numpy()
    queries = Places(document[:, None], place[:, None])
    keys = Places(document[None, :], place[None, :])
    seen = Mask(documents=Documents(lengths)).within(window).sees(queries, keys).numpy()
    assert seen.shape == (total, total)
    return int((seen & is_real[:, None] & is_real[None, :]).sum())


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("overrides", [[], WINDOWED, ["context.stages.1.has_document_mask=false"]])
def test_flops_are_those_of_the_documents_that_were_there(overrides: list[str]) -> None:
    sizes = [5 + 37 * number % 190 for number in range(100)]
    texts = "".join(json.dumps({"text": "x" * size}) + "\n" for size in sizes)
    Path("short.jsonl").write_text(texts)
    texts_alone = ["data.sources.words.path=short.jsonl", "context.stages.1.mixture={words = 1.0}"]
    config = load_config(TINY, [*texts_alone, *overrides])
    batches = Batches(config.data, seed=0)
    step = config.stages.at(4096).longest_step()
    rows = rows_of_step(config, step, 1)
    taken = batches.take(demand_of(step, batches), 0, 64, rows)
    counts = counts_of(taken, step, config.model)
    expected = 0
    for layer in range(config.model.num_layers):
        for batch in taken:
            padding, length = batch.padding_B.tolist(), batch.sequence_length
            expected += drawn_pairs(batch.mask_lengths, padding, length, config.model.window(layer))
    assert counts.pairs == expected and sum(int(batch.padding_B.sum()) for batch in taken) > 0
    assert counts.real_tokens == sum(int(batch.is_real_BT.sum()) for batch in taken)
    whole = of_whole_rows(config.model, 257, step.sequence_length)
    assert 0 < flops_per_token(config.model, 257, 64 * 128, counts, None) <= whole


def test_whole_rows_cost_what_the_formula_of_a_token_says() -> None:
    config = load_config(TINY, [])
    pairs = 2 * 4 * 128 * 129 // 2  # in two layers, of four rows
    ours = flops_per_token(config.model, 257, 512, StepCounts(512, pairs), None)
    assert ours == pytest.approx(of_whole_rows(config.model, 257, 128), rel=1e-12)
    half = flops_per_token(config.model, 257, 1024, StepCounts(512, pairs), None)
    assert half == ours / 2, "padding adds nothing"
    dropped = flops_per_token(config.model, 257, 512, StepCounts(512, pairs), 512 * 2 - 100)
    assert ours - dropped == pytest.approx(100 * 6 * 3 * 16 * 16 / 512), "a row that no expert computed"


def test_padding_is_the_share_of_places_without_a_token() -> None:
    assert padding_share(100, StepCounts(100, 0)) == 0 and padding_share(100, StepCounts(75, 0)) == 0.25


def test_mfu_is_what_its_formula_says_and_null_where_a_number_is_not_known() -> None:
    assert utilization(1000.0, 5e6, 1e11, 2) == 1000.0 * 5e6 / (1e11 * 2)
    assert utilization(1000.0, 5e6, None, 2) is None and utilization(1000.0, None, 1e11, 2) is None


def test_words_beside_a_speed_leave_out_what_is_not_known() -> None:
    assert beside(0.234, "top-2 of 4, learned", 0.031) == "MFU 23%, top-2 of 4 learned, padding 3.1%"
    assert beside(None, "dense", 0.0) == "dense, padding 0%"
    assert beside(0.00415) == "MFU 0.41%" and beside(None) == ""


def test_every_row_of_a_run_says_what_its_speed_is_worth(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "write_report", report.write_report)
    config = load_config(TINY, ["evals.tasks=[]", "model.moe.capacity={factor=0.75}"])
    train.main(config)
    folder = here / "runs/tiny"
    around = json.loads((folder / "environment.json").read_text())
    assert around["routing"] == "top-2 of 4, learned, capacity 0.75"
    assert around["peak_flops"] > 0 and "measured" in around["peak_source"] and "float32" in around["peak_source"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / around["peak_flops"])
        assert row["padding_share"] == 0 and row["dropped_share"] > 0
        counts = StepCounts(512, 2 * sum(row["distances"]))  # two layers, which see all of a document
        computed = (1 - row["dropped_share"]) * 512 * 2  # rows of the one that has experts
        assert row["flops_per_token"] == pytest.approx(flops_per_token(config.model, 257, 512, counts, computed))
    html = (folder / "report.html").read_text()
    assert FORMULA.split(".")[0] in html and "top-2 of 4 learned" in html and "(measured" in html
