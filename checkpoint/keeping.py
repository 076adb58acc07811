"""The checkpoints of a run's folder: which is the newest, which are good, and which may go."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from checkpoint.identity import different
from checkpoint.manifest import MANIFEST, Damaged, Manifest, read_json, read_text
from checkpoint.records import State, wrong_with
from checkpoint.sealed import verify
from settings import Refusal, Section

JSON = Any


class Keeping:
    """One folder of checkpoints, and what is known of each: verifying one takes as long as reading it.

    keep: how many of the newest stay; keep_every: the steps of those that stay for good.
    """

    def __init__(
        self, folder: Path, config: Section, warn: Callable[[str], None], *, keep: int, keep_every: int | None
    ) -> None:
        self.folder, self.config, self.warn = folder, config, warn
        self.keep, self.keep_every = keep, keep_every
        self.verdicts: dict[Path, bool] = {}
        """Whether a checkpoint is good, once that is known."""

    def verify(self, folder: Path, rank: int = 0, size: int = 1) -> tuple[Manifest, dict[str, JSON]]:
        """Manifest and state of a good checkpoint of this run; raises Damaged and Refusal as `sealed.verify`."""
        manifest, state = verify_steps(folder, rank, size)
        lines = different(read_text(folder, "config.toml"), self.config)
        if lines:
            raise Damaged(f"config.toml is of another configuration: {'; '.join(lines[:5])}")
        return manifest, state

    def is_good(self, folder: Path) -> bool | None:
        """Whether a folder is a good checkpoint of this run; None where it cannot be read."""
        if folder not in self.verdicts:
            try:
                self.verify(folder)
            except Damaged as damage:
                self.skip(folder, str(damage))
            except Refusal:
                return None
            else:
                self.verdicts[folder] = True
        return self.verdicts[folder]

    def skip(self, folder: Path, reason: str) -> None:
        """Note that a checkpoint is damaged, and say so."""
        self.verdicts[folder] = False
        self.warn(f"checkpoint {folder.name} is damaged and not used: {reason} ({folder})")

    def last_good(self) -> Path | None:
        return next((folder for folder in folders(self.folder) if self.is_good(folder)), None)

    def prune(self, newest: Path) -> None:
        """Remove what is neither new nor to stay; a damaged one goes once a good one as new as itself exists.

        newest: the checkpoint that has just been written, which is good.
        """
        self.verdicts[newest] = True
        num_good, stale = 0, []
        for folder in folders(self.folder):
            if num_good >= self.keep:  # nothing beyond them has to be read, however much there is
                stale += [folder] if folder != newest and not self._stays(folder) else []
            elif self.is_good(folder):
                num_good += 1
            elif self.verdicts.get(folder) is False and step_of(folder) <= step_of(newest):
                stale.append(folder)
        for folder in stale:
            shutil.rmtree(folder, ignore_errors=True)
            self.verdicts.pop(folder, None)

    def tidy(self, newest: Path) -> None:
        """Remove what a writer should have that died first; nothing is read where there is no more than may be.

        newest: the checkpoint that has just been read, which is good.
        """
        if any(not self._stays(folder) for folder in folders(self.folder)[self.keep :]):
            self.prune(newest)

    def _stays(self, folder: Path) -> bool:
        """Whether an old one stays for good; one that can no longer be read is left alone."""
        if self.keep_every and step_of(folder) % self.keep_every == 0:
            return True
        try:
            return bool(read_json(folder, MANIFEST).get("is_stage_end"))
        except (Damaged, Refusal):
            return True


def newest_good(
    folder: Path, candidates: Iterable[Path], read: Callable[[Path], Any], skip: Callable[[Path, str], None]
) -> tuple[Path, Any] | None:
    """The first candidate that `read` returns something of, and that; None where there are none.

    Raises Refusal, naming them all, when every one is damaged.
    """
    reasons = []
    for candidate in candidates:
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


def verify_steps(folder: Path, rank: int = 0, size: int = 1) -> tuple[Manifest, dict[str, JSON]]:
    """Manifest and state of a verified folder; Damaged when folder, manifest and state do not name the same step.

    rank, size: see `checkpoint.sealed.verify`.
    """
    manifest = verify(folder, rank, size)
    state = read_json(folder, "state.json")
    if not isinstance(state, dict):
        raise Damaged("state.json holds no table")
    if wrong := wrong_with(state, State):
        raise Damaged(f"state.json: {wrong}")
    steps = {MANIFEST: manifest.get("step"), "state.json": state.get("step", manifest.get("step"))}
    if is_step(folder):
        steps["the folder's name"] = step_of(folder)
    if any(step != steps[MANIFEST] for step in steps.values()):
        raise Damaged("it was renamed or mixed: " + ", ".join(f"{where} says step {n}" for where, n in steps.items()))
    return manifest, state


def folders(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    return sorted((path for path in folder.glob("step_*") if is_step(path)), key=step_of, reverse=True)


def is_step(folder: Path) -> bool:
    return folder.is_dir() and folder.name.startswith("step_") and folder.name.removeprefix("step_").isdecimal()


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
