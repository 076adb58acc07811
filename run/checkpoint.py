"""Checkpoints: weights and optimizer state that come back bit for bit, or are refused by name.

runs/<name>/checkpoints/step_00000100/ holds model.safetensors (parameters and persistent buffers),
optimizer.safetensors and optimizer.json (its tensors and its numbers), state.json (where the run stood), config.toml
and manifest.json (run/sealed.py).
"""

import errno
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import nn

from parallel.shard import cut_all, gather_all, outline_all
from run.identity import different
from run.optimizer_state import check_same, load_state, shards_of, state_of
from run.sealed import (
    MANIFEST,
    Damaged,
    Manifest,
    Tensors,
    clean,
    read_json,
    read_tensors,
    read_text,
    verify,
    write_sealed,
)
from settings import Refusal, Section, to_toml

JSON: TypeAlias = Any
SLACK_BYTES = 1 << 20  # JSON, headers and the file system's own blocks


class CheckpointSettings(Section):
    """How often a run is saved, and how many of its checkpoints stay."""

    every_steps: int = Field(default=500, ge=1)
    """Steps from one checkpoint to the next; the end of a run and of a stage are saved as well."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest checkpoints stay on the disk; the end of each stage stays beside them, for branches."""


class Checkpoints:
    """Saves and restores one model and its optimizers in one run's folder.

    A file holds every tensor whole, whatever ranks share it: rank 0 gathers and writes, every rank reads and takes its
    part. `latest_step` is the step of the newest checkpoint that this object has written or restored, or None.
    """

    def __init__(  # noqa: PLR0917 (six, and no object is missing)
        self,
        run_folder: Path,
        settings: CheckpointSettings,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        config: Section,
        warn: Callable[[str], None],
    ) -> None:
        self.folder = run_folder / "checkpoints"
        self.settings, self.model, self.optimizers = settings, model, tuple(optimizers)
        self.config, self.warn = config, warn
        self.latest_step: int | None = None
        self._verdicts: dict[Path, bool] = {}  # whether a folder is good, once that is known
        if _is_writer():
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder)

    def due(self, step: int) -> bool:
        """Whether the settings ask for a checkpoint of this step."""
        return step % self.settings.every_steps == 0

    def save(self, step: int, state: Mapping[str, JSON], *, is_stage_end: bool = False) -> Path:
        """Write the checkpoint of `step` and remove what is older than the newest `keep`; `state` is plain JSON.

        A step that this object has just written or restored is not written twice. Raises Refusal when the disk is full;
        the checkpoints that were there before are then still there. The end of a stage is never removed.
        """
        target = self.folder / f"step_{step:08d}"
        if step == self.latest_step:
            return target
        weights = gather_all(_targets(self.model), shards_of(self.model))
        moments, optimizer_values = state_of(self.model, self.optimizers)
        if _is_writer():
            files = {"model.safetensors": weights, "optimizer.safetensors": moments}
            facts = {"step": step, "torch": torch.__version__, "is_stage_end": is_stage_end}
            self._write(target, facts, {"state.json": dict(state), "optimizer.json": optimizer_values}, files)
            self._prune(target)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.latest_step = step
        return target

    def restore_latest(self) -> dict[str, JSON] | None:
        """Load the newest good checkpoint into model and optimizers and return its state; None where there is none.

        A checkpoint that is damaged, renamed or of another configuration is warned about by name and the one before
        it is taken. Raises Refusal when none is good, when one cannot be read, and, with nothing loaded, when the
        checkpoint is of another model or of another optimizer.
        """
        found = _newest_good(self.folder, self._read, self._skip)
        if found is None:
            return None
        folder, content = found
        self._load(folder, content)
        self.latest_step = _step_of(folder)
        self._verdicts[folder] = True
        return content.state

    def restore(self, folder: Path) -> dict[str, JSON]:
        """Load a checkpoint of another run and return its state; raises Damaged, with nothing loaded, where it is."""
        content = _read_whole(folder, *_verify_steps(folder))
        self._load(folder, content)
        return content.state

    def _load(self, folder: Path, content: "_Content") -> None:
        targets, shards = _targets(self.model), shards_of(self.model)
        check_same(folder.name, "model", content.weights, outline_all(targets, shards))
        load_state(folder.name, self.model, self.optimizers, content.optimizer_tensors, content.optimizer_values)
        with torch.no_grad():
            for name, tensor in cut_all(content.weights, shards).items():
                targets[name].copy_(tensor)

    def _write(
        self, target: Path, facts: Mapping[str, JSON], tables: Mapping[str, JSON], files: Mapping[str, Tensors]
    ) -> None:
        texts = {name: json.dumps(table, indent=1, allow_nan=False) for name, table in tables.items()}
        texts["config.toml"] = to_toml(self.config)
        needed = sum(tensor.nbytes for named in files.values() for tensor in named.values()) + SLACK_BYTES
        if needed > shutil.disk_usage(self.folder).free:
            raise self._disk_full(target, needed)
        try:
            write_sealed(target, texts, files, facts)
        except (OSError, SafetensorError) as error:
            if not _is_disk_full(error):
                raise
            raise self._disk_full(target, needed) from error

    def _disk_full(self, target: Path, needed: int) -> Refusal:
        free = shutil.disk_usage(self.folder).free
        good = next((folder for folder in _folders(self.folder) if self._is_good(folder)), None)
        kept = f"the last good checkpoint {good.name} is intact" if good else "there is no earlier checkpoint"
        return Refusal(
            f"{target}: the disk is full: a checkpoint needs {_megabytes(needed)}, {_megabytes(free)} are free in"
            f" {self.folder}; {kept}. Free some space there (or lower checkpoint.keep) and start the same command again"
        )

    def _prune(self, newest: Path) -> None:
        """Keep the newest good folders and stage ends; a damaged one goes once a good one as new as itself exists."""
        self._verdicts[newest] = True
        folders = _folders(self.folder)
        good = [folder for folder in folders if self._is_good(folder)]
        old = [folder for folder in good[self.settings.keep :] if folder != newest]
        stale = [folder for folder in old if not read_json(folder, MANIFEST).get("is_stage_end")]
        stale += [f for f in folders if self._is_good(f) is False and _step_of(f) <= _step_of(newest)]
        for folder in stale:
            shutil.rmtree(folder, ignore_errors=True)
            self._verdicts.pop(folder, None)

    def _is_good(self, folder: Path) -> bool | None:
        """Whether a folder is a good checkpoint of this run; None where it cannot be read."""
        if folder not in self._verdicts:
            try:
                self._verify(folder)
            except Damaged as damage:
                self._skip(folder, str(damage))
            except Refusal:
                return None
            else:
                self._verdicts[folder] = True
        return self._verdicts[folder]

    def _skip(self, folder: Path, reason: str) -> None:
        self._verdicts[folder] = False
        self.warn(f"checkpoint {folder.name} is damaged and not used: {reason} ({folder})")

    def _verify(self, folder: Path) -> tuple[Manifest, dict[str, JSON]]:
        manifest, state = _verify_steps(folder)
        lines = different(read_text(folder, "config.toml"), self.config)
        if lines:
            raise Damaged(f"config.toml is of another configuration: {'; '.join(lines[:5])}")
        return manifest, state

    def _read(self, folder: Path) -> "_Content":
        return _read_whole(folder, *self._verify(folder))


class _Content(NamedTuple):
    """A checkpoint in memory."""

    state: dict[str, JSON]
    weights: Tensors
    optimizer_tensors: Tensors
    optimizer_values: dict[str, JSON]


def _read_whole(folder: Path, manifest: Manifest, state: dict[str, JSON]) -> _Content:
    """The content of a folder that is verified."""
    weights = read_tensors(folder, "model.safetensors", manifest)
    optimizer_tensors = read_tensors(folder, "optimizer.safetensors", manifest)
    return _Content(state, weights, optimizer_tensors, read_json(folder, "optimizer.json"))


def read_checkpoint(
    path: Path | str, warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> tuple[dict[str, JSON], str, Tensors]:
    """The state, the resolved configuration and the weights of a checkpoint, each byte verified.

    path: a checkpoint's folder, or a run's folder, whose newest good checkpoint is taken. Raises Refusal when there is
    none.
    """
    path = Path(path)
    if not path.is_dir():
        why = "is a file" if path.exists() else "a link that leads nowhere" if path.is_symlink() else "no such folder"
        raise Refusal(f"{path}: {why}; give a run's folder or one of its checkpoints/step_… folders")
    if (path / MANIFEST).is_file() or path.name.startswith("step_"):
        try:
            return _read_for_evals(path)
        except Damaged as damage:
            raise Refusal(f"{path}: this checkpoint is damaged: {damage}; use another one") from None
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = _newest_good(
        folder, _read_for_evals, lambda bad, why: warn(f"checkpoint {bad.name} is damaged and not used: {why}")
    )
    if found is None:
        raise Refusal(f"{path}: holds no checkpoint; give a run's folder or one of its checkpoints/step_… folders")
    return found[1]


def _read_for_evals(folder: Path) -> tuple[dict[str, JSON], str, Tensors]:
    manifest, state = _verify_steps(folder)
    return state, read_text(folder, "config.toml"), read_tensors(folder, "model.safetensors", manifest)


def _verify_steps(folder: Path) -> tuple[Manifest, dict[str, JSON]]:
    """Manifest and state of a verified folder; Damaged when folder, manifest and state do not name the same step."""
    manifest = verify(folder)
    state = read_json(folder, "state.json")
    steps = {MANIFEST: manifest.get("step"), "state.json": state.get("step", manifest.get("step"))}
    if _is_step(folder):
        steps["the folder's name"] = _step_of(folder)
    if len(set(steps.values())) > 1:
        raise Damaged("it was renamed or mixed: " + ", ".join(f"{where} says step {n}" for where, n in steps.items()))
    return manifest, state


def _newest_good(
    folder: Path, read: Callable[[Path], Any], skip: Callable[[Path, str], None]
) -> tuple[Path, Any] | None:
    reasons = []
    for candidate in _folders(folder):
        try:
            return candidate, read(candidate)
        except Damaged as damage:
            skip(candidate, str(damage))
            reasons.append(f"  {candidate.name}: {damage}")
    if reasons:
        raise Refusal(
            f"{folder}: none of the {len(reasons)} checkpoints is good:\n" + "\n".join(reasons) + "\n"
            "Put a good copy back; a run of its own starts anew with --fresh"
        )
    return None


def _targets(model: nn.Module) -> Tensors:
    """Parameters and persistent buffers as they stand, under their plain names."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}


def _folders(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    return sorted((path for path in folder.glob("step_*") if _is_step(path)), key=_step_of, reverse=True)


def _is_step(folder: Path) -> bool:
    return folder.is_dir() and folder.name.startswith("step_") and folder.name.removeprefix("step_").isdecimal()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _is_writer() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _is_disk_full(error: Exception) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    # safetensors writes in Rust and hands the number over in its text alone.
    return getattr(error, "errno", None) in codes or any(f"os error {code}" in str(error) for code in codes)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
