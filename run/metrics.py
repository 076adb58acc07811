"""What a run measures, as it goes: metrics.jsonl, evals.jsonl, TensorBoard, and one live line in the terminal."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from checkpoint import records
from run.files import read_bytes
from run.speed import beside
from settings import Refusal

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, Any]
POSITION = ("step", "tokens")
"""What every row has: where in the run it was measured."""


class HasRow(Protocol):
    def row(self, step: int, tokens: int) -> Mapping[str, Any]: ...


class Metrics:
    """Appends rows to a run's metrics.jsonl and evals.jsonl, flushed line by line, and mirrors them in TensorBoard.

    resumed_step: the step of the checkpoint that the run continues from; None or 0 for a new run. Rows of later steps
    and a half-written last line are dropped, so that no step stands twice.
    """

    def __init__(self, folder: Path, resumed_step: int | None, tensorboard: bool = True) -> None:
        self.folder, self._resumed_step = folder, resumed_step or 0
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = _open_at(folder / "metrics.jsonl", self._resumed_step)
        self._evals = _open_at(folder / "evals.jsonl", self._resumed_step)
        self._tensorboard = _open_tensorboard(folder / "tensorboard", self._resumed_step) if tensorboard else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row; it names its `step` and `tokens`. NaN and infinities become null."""
        _write(self._metrics, [row])
        self._mirror({key: value for key, value in row.items() if key not in POSITION}, row["step"])

    def log_evals(self, step: int, tokens: int, cells: Iterable[Mapping[str, Any] | HasRow]) -> None:
        """Append one row for each cell: `step`, `tokens` and the cell's own fields."""
        if step == self._resumed_step:  # the run died between these evals and its next step: they are asked again
            self._evals.close()
            self._evals = _open_at(self.folder / "evals.jsonl", step - 1)
            self._resumed_step = -1
        rows = [
            {"step": step, "tokens": tokens, **(cell if isinstance(cell, Mapping) else cell.row(step, tokens))}
            for cell in cells
        ]
        _write(self._evals, rows)
        scores: dict[str, list[float]] = {}
        for row in rows:
            scores.setdefault(f"evals/{row['task']}/{row['length']}", []).append(row["score"])
        self._mirror({tag: sum(values) / len(values) for tag, values in scores.items()}, step)

    def show_figure(self, tag: str, figure: "Figure", step: int) -> None:
        """Put a picture into TensorBoard, where that is on."""
        if self._tensorboard is not None:
            self._tensorboard.add_figure(tag, figure, step)

    def close(self) -> None:
        self._metrics.close()
        self._evals.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _mirror(self, values: Mapping[str, Any], step: int) -> None:
        if self._tensorboard is None:
            return
        for tag, value in values.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(tag, value, step)


def read_rows(path: Path | str, kind: type[records.Row] = records.Row) -> list[Row]:
    """The rows of a JSON-lines file; none where there is no file. An unfinished line is no row.

    Raises Refusal naming the line and the key of a row that is not of this kind.
    """
    path = Path(path)
    return [row for _, row in _whole_lines(path, kind)] if path.exists() else []


class ProgressLine:
    """One live line in a terminal; elsewhere one plain line every `every_seconds`, and one at the end.

    Rows are those of metrics.jsonl: `tokens`, and as far as they are there `loss`, `tokens_per_second`, `mfu`,
    `padding_share`, `stage` and `sequence_length`.
    """

    def __init__(
        self,
        name: str,
        total_tokens: int,
        *,
        routing: str = "",
        every_seconds: float = 10.0,
        console: Console | None = None,
    ) -> None:
        """routing: how the model routes, in words, which stand beside its speed."""
        self.console, self._routing = console or Console(), routing
        self.total_tokens, self.every_seconds = total_tokens, every_seconds
        self._name, self._last_line, self._printed_at = name, "", -math.inf
        self._speed: float | None = None
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(name, total=total_tokens, line="")
            self._bar.start()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show where the run stands."""
        speed = row.get("tokens_per_second")
        if speed:
            self._speed = speed if self._speed is None else 0.8 * self._speed + 0.2 * speed
        self._last_line = self.describe(row)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["tokens"], line=self._last_line)
        elif time.monotonic() - self._printed_at >= self.every_seconds:
            self._print_line()

    def show(self, renderable: RenderableType) -> None:
        """Print something above the line."""
        self.console.print(renderable)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last_line:
            self._print_line()

    def describe(self, row: Mapping[str, Any]) -> str:
        """`1.2M/6.6M tokens  loss 2.134  41K tokens/s (MFU 23%, top-2 of 4 learned, padding 3%)  2:10 left  stage 1
        (length 128)`, in one line."""
        parts = [f"{short(row['tokens'])}/{short(self.total_tokens)} tokens"]
        if row.get("loss") is not None:
            parts.append(f"loss {row['loss']:.3f}")
        if self._speed:
            around = beside(row.get("mfu"), self._routing, row.get("padding_share"))
            parts.append(f"{short(self._speed)} tokens/s" + (f" ({around})" if around else ""))
            parts.append(f"{clock(max(0, self.total_tokens - row['tokens']) / self._speed)} left")
        if row.get("stage") is not None:
            length = f" (length {row['sequence_length']})" if "sequence_length" in row else ""
            parts.append(f"stage {row['stage']}{length}")
        return "  ".join(parts)

    def _print_line(self) -> None:
        self.console.print(f"{self._name}: {self._last_line}", markup=False, highlight=False, soft_wrap=True)
        self._last_line, self._printed_at = "", time.monotonic()


def short(count: float) -> str:
    """`950`, `12.3K`, `4.56M`, `7.89B`: three digits of a count."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size * 0.9995:
            return f"{count / size:.3g}{letter}" if count < size * 999.5 else f"{count / size:.0f}{letter}"
    return f"{count:.3g}" if count != int(count) else f"{int(count)}"


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`; `–` when it is not known."""
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _whole_lines(path: Path, kind: type[records.Row] = records.Row) -> Iterator[tuple[str, Row]]:
    for number, content in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
        try:
            line = content.decode("utf-8")
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut short, or the zeros that a power cut leaves
            continue
        if not isinstance(row, dict):
            continue
        if wrong := records.wrong_with(row, kind):
            raise Refusal(f"{path}, line {number}: {wrong}; remove the line or put a good copy of the file back")
        yield line, row


def _open_at(path: Path, last_step: int) -> TextIO:
    """Open for appending, with the rows of later steps dropped; the old file stays whole until the new one is."""
    if path.exists():
        partial = path.with_name(f".partial_{path.name}")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line, row in _whole_lines(path) if row["step"] <= last_step)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return path.open("a", encoding="utf-8")


def _write(file: TextIO, rows: Iterable[Mapping[str, Any]]) -> None:
    # One write for all rows: a kill between two cells of one evaluation is then all but impossible.
    file.write("".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows))
    file.flush()


def plain(value: Any) -> Any:
    """The value as valid JSON: NaN and infinities are null, scalars of torch and numpy are numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_tensorboard(folder: Path, resumed_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resumed_step + 1 if folder.exists() else None)
