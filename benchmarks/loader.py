"""How fast data gets ready: rows a second against what the model takes, and tokenising in MB/s of text on one core.

No model computes here, so no MFU and no routing stands beside these speeds: padding alone.
"""

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import keep
from data.batches import Batches
from data.corpus import local_python
from data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, train_bpe
from run.config import RunConfig, load_config
from run.demand import demand_of

Row = dict[str, Any]


def loading(config: RunConfig, steps: int) -> list[Row]:
    """Tokens a second of `Batches.take` at each stage of the configuration, one step at a time."""
    batches = Batches(config.data, seed=0)
    rows = []
    for plan in config.stages.first_steps():
        demand, samples = demand_of(plan, batches), plan.num_samples
        batches.take(demand, 0, samples, samples)  # packs the epoch
        begin, real = time.perf_counter(), 0
        for step in range(1, steps + 1):
            real += sum(batch.num_real for batch in batches.take(demand, step * samples, samples, samples))
        speed, places = steps * plan.num_tokens / (time.perf_counter() - begin), steps * plan.num_tokens
        told = {"tokens_per_second": round(speed), "padding_share": 1 - real / places, "model": "none, data alone"}
        rows.append({"what": "loader", "length": plan.sequence_length, **told})
    return rows


def tokenising(name: str, tokenizer: Tokenizer, texts: list[bytes]) -> Row:
    begin = time.perf_counter()
    for text in texts:
        tokenizer.encode_bytes(text)
    speed = sum(map(len, texts)) / (time.perf_counter() - begin)
    return {"what": "tokenising", "tokenizer": name, "megabytes_per_second": round(speed / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/loader.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = loading(load_config(arguments.config, []), arguments.steps)
    texts = [document.text for document in islice(local_python(), 400)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "bpe.json"
        train_bpe([text.decode() for text in texts[:100]], 8192, vocabulary)
        rows.append(tokenising("bpe 8192", BpeTokenizer(vocabulary), texts))
    rows.append(tokenising("byte", ByteTokenizer(), texts))
    for row in rows:
        print(row)
    if arguments.keep:
        print(keep("loader", rows))


if __name__ == "__main__":
    main()
