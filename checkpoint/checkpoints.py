"""Checkpoints: weights and optimizer state that come back bit for bit, or are refused by name.

runs/<name>/checkpoints/step_00000100/ holds model.safetensors (parameters and persistent buffers),
optimizer.safetensors and optimizer.json (its tensors and its numbers), state.json (where the run stood), config.toml
and manifest.json (manifest.py). Tensors are whole in them, however ranks share them; several ranks that write do so
into several files, model-00001-of-00004.safetensors.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from checkpoint.deal import Held
from checkpoint.fit import check_same
from checkpoint.keeping import Keeping, folders, newest_good, step_of, verify_steps
from checkpoint.manifest import MANIFEST, Damaged, Manifest, outlines_of, read_json, read_text, ties_of
from checkpoint.optimizer_state import (
    Wanted,
    check_values,
    load_state,
    new_options,
    owner_of,
    state_of,
    wanted_state,
)
from checkpoint.peers import Peers
from checkpoint.sealed import Pick, Tensors, clean, read_tensors, untied
from checkpoint.snapshot import Camera
from checkpoint.tensor_file import outline
from checkpoint.writing import Writing, settle
from parallel.layout import Index, Layout, Layouts, local
from parallel.mesh import Grid, Mesh
from parallel.world import World
from settings import Refusal, Section, to_toml

JSON: TypeAlias = Any


class CheckpointSettings(Section):
    """How often a run is saved, and how many of its checkpoints stay."""

    every_steps: int = Field(default=500, ge=1)
    """Steps from one checkpoint to the next; the end of a run and of a stage are saved as well."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest checkpoints stay on the disk; the end of each stage stays beside them, for branches."""
    keep_every: int | None = Field(default=None, ge=1)
    """Every so many steps one is saved that stays for good; left out, none but the ends of stages do."""
    asynchronous: bool = True
    """The step waits for a copy in memory alone, and files are written while training goes on; at the end of a stage
    and of the run it waits for them. false: it always does."""


class _Content(NamedTuple):
    """What this rank needs of a checkpoint, in memory."""

    state: dict[str, JSON]
    weights: Tensors
    moments: Tensors
    wanted: Mapping[str, Wanted]
    numbers: Mapping[str, JSON]


class Checkpoints:
    """Saves and restores one model and its optimizers in one run's folder, on all of its ranks together.

    `latest_step` is the step of the newest checkpoint that this object has restored, written or begun to write, or
    None. All ranks have to call each method but `due`.
    """

    def __init__(  # noqa: PLR0917 (eight, and no object is missing)
        self,
        run_folder: Path,
        settings: CheckpointSettings,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        config: Section,
        warn: Callable[[str], None],
        layouts: Layouts | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """layouts, mesh: how the model lies on the ranks; left out, all of it on each of them."""
        self.folder = run_folder / "checkpoints"
        self.settings, self.model, self.optimizers, self.config = settings, model, tuple(optimizers), config
        world = mesh.world if mesh else this_world()
        self.grid = mesh.grid if mesh else Grid(world.size)
        self.layouts = layouts if layouts is not None else _whole(model)
        self.peers = Peers(world)
        self.keeping = Keeping(self.folder, config, warn, keep=settings.keep, keep_every=settings.keep_every)
        self.latest_step: int | None = None
        self._camera = Camera(self.peers, self.layouts, self.grid)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._step_before: int | None = None
        settle()
        if self.peers.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder)

    def due(self, step: int) -> bool:
        """Whether the settings ask for a checkpoint of this step."""
        return any(every and step % every == 0 for every in (self.settings.every_steps, self.settings.keep_every))

    def save(self, step: int, state: Mapping[str, JSON], *, is_stage_end: bool = False) -> Path:
        """Save `step` and remove what is old; `state` is plain JSON. Returns the folder that will be there.

        What is saved is what the model and the optimizers are at the time of the call. It may be written later, by
        `wait` at the latest; a stage's end is written at once. A step that this object has just written, or restored,
        is not written twice. Raises Refusal, on all ranks, when the disk is full, for this checkpoint or the one
        before; the checkpoints that were there before are then still there.
        """
        self.wait()
        target = self.folder / f"step_{step:08d}"
        if step == self.latest_step:
            return target
        facts = {"step": step, "torch": torch.__version__, "is_stage_end": is_stage_end}
        texts = {"state.json": _json(state), "config.toml": to_toml(self.config)}
        tensors = _tensors(self.model)
        parts, tied = untied({name: local(tensor.detach()) for name, tensor in tensors.items()})
        moments, numbers = state_of(_names(tensors), self.optimizers)
        files = {"model.safetensors": {name: Held(part, name) for name, part in parts.items()}}
        shot = self._camera.take({**files, "optimizer.safetensors": moments}, tied)
        writing = Writing(target, shot, facts, texts, _json(numbers), self.peers, self.keeping)
        self._writing = writing.start(self._thread)
        self._step_before, self.latest_step = self.latest_step, step
        if is_stage_end or not self.settings.asynchronous:
            self.wait()
        return target

    @property
    def has_failed(self) -> bool:
        """Whether what is being written has come to grief here: `wait` says so, and on all ranks."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until all that was saved is on the disk; raises Refusal, on all ranks, where it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except BaseException:
                self.latest_step = self._step_before
                raise

    def close(self) -> None:
        """The end of saving: wait, and let the thread go."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore_latest(self) -> dict[str, JSON] | None:
        """Load the newest good checkpoint into model and optimizers and return its state; None where there is none.

        A checkpoint that is damaged, renamed or of another configuration is warned about by name and the one before
        it is taken. Raises Refusal when none is good, when one cannot be read, and, with nothing loaded, when the
        checkpoint is of another model or of another optimizer.
        """
        self.wait()
        names = self.peers.tell([folder.name for folder in folders(self.folder)])[0]
        candidates = [self.folder / name for name in names]
        found = newest_good(self.folder, candidates, lambda f: self._read(f, self.keeping.verify), self.keeping.skip)
        if found is None:
            return None
        folder, content = found
        self._load(content)
        self.latest_step = step_of(folder)
        self.keeping.verdicts[folder] = True
        if self.peers.is_main:
            self.keeping.tidy(folder)  # a run that was killed in its last save has no other save to do it
        return content.state

    def restore(self, folder: Path) -> dict[str, JSON]:
        """Load a checkpoint of another run and return its state; raises Damaged, with nothing loaded, where it is."""
        self.wait()
        content = self._read(folder, verify_steps)
        self._load(content)
        return content.state

    def _read(self, folder: Path, verify: Callable[..., tuple[Manifest, dict[str, JSON]]]) -> "_Content":
        """This rank's parts of a checkpoint that all ranks verify together, each some of the files."""
        manifest, state = self.peers.agree(lambda: verify(folder, self.peers.rank, self.peers.size))
        if len(set(self.peers.tell(manifest["digest"]))) > 1:
            raise Refusal(f"{folder}: ranks see different files there; runs/ has to be one folder for all of them")
        return self.peers.agree(lambda: self._read_parts(folder, manifest, state))

    def _read_parts(self, folder: Path, manifest: Manifest, state: dict[str, JSON]) -> "_Content":
        another, unharmed = f"checkpoint {folder.name} is of another", "nothing was loaded"
        here = _tensors(self.model)
        ours = {name: outline(layout.dtype, layout.shape) for name, layout in self.layouts.items()}
        ours |= {name: outline(tensor.dtype, self.layouts[name].shape) for name, tensor in here.items()}
        check_same(f"{another} model; {unharmed}", outlines_of(manifest, "model.safetensors"), ours)
        check_values(values := read_json(folder, "optimizer.json"))
        wanted: dict[str, Wanted] = {}
        moments: Tensors = {}
        if self.optimizers:
            names = _names(here)
            saved = outlines_of(manifest, "optimizer.safetensors")
            elsewhere = self.layouts.keys() - set(names.values())
            saved = {key: saved[key] for key in saved if owner_of(key) not in elsewhere}
            wanted = wanted_state(names, self.optimizers, self.layouts)
            wanted = {key: want for key, want in wanted.items() if owner_of(key) not in values["untouched"]}
            outlines = {key: want.outline for key, want in wanted.items()}
            check_same(f"{another} optimizer; {unharmed}", saved, outlines)
            new_options(folder.name, names, self.optimizers, values["numbers"])
            owners = {key: want.owner for key, want in wanted.items()}
            moments = read_tensors(folder, "optimizer.safetensors", manifest, self._pick(owners))
        tied = {kept for alias, kept in ties_of(manifest, "model.safetensors").items() if alias in here}
        owners = {name: name for name in (*here, *tied)}
        weights = read_tensors(folder, "model.safetensors", manifest, self._pick(owners))
        return _Content(state, weights, moments, wanted, values["numbers"])

    def _pick(self, owners: Mapping[str, str | None]) -> Pick:
        """This rank's part of each tensor that is named; owners: what it lies as, None: it is whole."""

        def pick(name: str, shape: torch.Size) -> Index | None:
            if name not in owners:
                return None
            owner = owners[name]
            layout = Layout(shape) if owner is None else self.layouts[owner]
            return layout.index(self.grid, self.peers.rank)

        return pick

    @torch.no_grad()
    def _load(self, content: "_Content") -> None:
        here = _tensors(self.model)
        if self.optimizers:
            load_state(_names(here), self.optimizers, content.wanted, content.moments, content.numbers)
        for name, tensor in here.items():
            local(tensor).copy_(content.weights[name])


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
    found = newest_good(
        folder,
        folders(folder),
        _read_for_evals,
        lambda bad, why: warn(f"checkpoint {bad.name} is damaged and not used: {why}"),
    )
    if found is None:
        raise Refusal(f"{path}: holds no checkpoint; give a run's folder or one of its checkpoints/step_… folders")
    return found[1]


def _read_for_evals(folder: Path) -> tuple[dict[str, JSON], str, Tensors]:
    manifest, state = verify_steps(folder)
    return state, read_text(folder, "config.toml"), read_tensors(folder, "model.safetensors", manifest)


def this_world() -> World:
    """All ranks of this run, of those that are joined."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


def _tensors(model: nn.Module) -> Tensors:
    """Parameters and persistent buffers themselves, under their plain names; a tied one under each of its names."""
    named = model.state_dict(keep_vars=True)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named.items()}


def _names(tensors: Mapping[str, Tensor]) -> dict[nn.Parameter, str]:
    """Each parameter's first name."""
    names: dict[nn.Parameter, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            names.setdefault(tensor, name)
    return names


def _whole(model: nn.Module) -> Layouts:
    return {name: Layout(tensor.shape, tensor.dtype) for name, tensor in _tensors(model).items()}


def _json(table: Mapping[str, JSON]) -> str:
    return json.dumps(dict(table), indent=1, allow_nan=False)
