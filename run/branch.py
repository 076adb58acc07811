"""A branch: a run that goes on from where another one entered a stage, and does otherwise from there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from checkpoint.identity import MAY_CHANGE, may_change, read_recorded
from checkpoint.manifest import MANIFEST, Damaged, read_json, read_text
from checkpoint.records import read_materials
from run.files import read_text as read_file
from settings import Refusal, Section, differences

if TYPE_CHECKING:
    from checkpoint.checkpoints import Checkpoints
    from run.config import RunConfig
    from run.start import Run

MAY_DIFFER = (
    *MAY_CHANGE,
    *("branch", "total_tokens", "evals", "guard"),
    *("tokens_per_microbatch", "compile", "loss_chunk"),
)
"""Keys that say nothing about the stages before, or only how they were computed."""


class BranchSettings(Section):
    """Weights, moments, the place in the data and in the schedule are those of the other run; the name is its own."""

    run: str
    """The other run's folder: read once, when this run starts, and not needed once it has a checkpoint of its own."""
    stage: int = Field(ge=1)
    """Number of the stage that the branch begins with, as in context.stages.1; all before it were the other run's."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a branch begins with."""

    run: str
    """The folder of the run that wrote it: the one that was named, or the one which that is a branch of."""
    stage: int
    step: int
    tokens: int
    digest: str
    """Of the checkpoint's manifest."""

    @property
    def checkpoint(self) -> Path:
        return _checkpoint_of(self.run, self.step)

    def facts(self) -> dict[str, Any]:
        """What the branch's folder keeps of it."""
        return {"branched_from": asdict(self)}


def find_origin(run: "Run", materials: Mapping[str, str]) -> Origin | None:
    """Where a branch begins, its folder unread but for small files; None for a run that is none or has begun.

    materials: fingerprints of the data. Raises Refusal when the other run is not there or has not come to that stage,
    and naming every key before the stage, and every source, that differs.
    """
    config, branch = run.config, run.config.branch
    if branch is None or any((run.folder / "checkpoints").glob("step_*")):
        return None
    if Path(branch.run).resolve() == run.folder.resolve():
        raise _refusal(branch, "is this run's own folder; give the branch a name of its own: name=...")
    where, theirs = _owner(branch, config)
    _refuse_other_past(branch, theirs, config)
    step = sum(stage.num_steps for stage in list(config.stages)[: branch.stage])
    tokens, folder = config.stages[branch.stage].start_tokens, _checkpoint_of(where, step)
    if not folder.is_dir():
        raise _refusal(
            branch,
            f"{folder} is missing: the run has not come to the beginning of context.stages.{branch.stage} "
            f"({tokens:,} tokens), or its checkpoint was removed; let it train until there",
        )
    try:
        _refuse_other_past(branch, read_recorded(read_text(folder, "config.toml"), type(config), str(folder)), config)
        manifest = read_json(folder, MANIFEST)
        digest = str(manifest.get("digest")) if isinstance(manifest, dict) else ""
    except Damaged as damage:
        raise _damaged(branch, folder, damage) from None
    _refuse_other_data(branch, Path(where), materials)
    return Origin(where, branch.stage, step, tokens, digest)


def begin_branch(checkpoints: "Checkpoints", origin: Origin, run: "Run") -> dict[str, Any]:
    """Load what the branch begins with, every byte verified, and say so; returns the other run's state at that point.

    Without its gate's verdict, and without what its stage ended with where this run asks otherwise.
    """
    assert run.config.branch is not None
    try:
        state = checkpoints.restore(origin.checkpoint)
    except Damaged as damage:
        raise _damaged(run.config.branch, origin.checkpoint, damage) from None
    run.say(f"branches from {origin.checkpoint}: context.stages.{origin.stage} begins, {origin.tokens:,} tokens")
    theirs = read_recorded(read_text(origin.checkpoint, "config.toml"), type(run.config), str(origin.checkpoint))
    for line in differences(_with_freedom(theirs, run.config, MAY_CHANGE), run.config):
        run.say(f"  otherwise than there: {line}")
    # Its verdict was on a stage that this run does not train, by a gate that may be another one here.
    state = {**state, "verdict": None}
    return state if _asks_alike(theirs, run.config) else {**state, "stage_end": []}


def _owner(branch: BranchSettings, config: "RunConfig") -> tuple[str, "RunConfig"]:
    """The run that trained up to the stage: the one named, or, where that is a branch from there on, its own origin."""
    where, seen = branch.run, set[str]()
    while where not in seen:
        seen.add(where)
        path = Path(where) / "config.toml"
        if not path.is_file():
            raise _refusal(branch, f"{path}: no such file, so {where} is no run; name a run's folder")
        theirs = read_recorded(read_file(path), type(config), str(path))
        if theirs.branch is None or theirs.branch.stage < branch.stage:
            return where, theirs
        where = theirs.branch.run
    raise _refusal(branch, f"{where} is a branch of itself")


def _refuse_other_past(branch: BranchSettings, theirs: "RunConfig", ours: "RunConfig") -> None:
    """Refuse, by name, what differs and would have made the stages before the branch different ones."""
    if len(theirs.context.stages) < branch.stage:
        raise _refusal(branch, f"it has {len(theirs.context.stages)} of the {branch.stage} stages before that one")
    lines = different_past(theirs, ours, branch.stage)
    if lines:
        listed = "\n  ".join(lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else []))
        raise _refusal(
            branch,
            f"its stages before context.stages.{branch.stage} were trained otherwise:\n  {listed}\n"
            f"a branch may differ from context.stages.{branch.stage} on; set these as they were there, or train anew "
            "without branch",
        )


def different_past(theirs: "RunConfig", ours: "RunConfig", stage: int) -> list[str]:
    """A line for each key that would have made the run different before the stage began.

    Later stages are free, and so are the gates of earlier ones and sources that the other run lacks.
    """
    stages = ours.context.stages
    earlier = [
        before.model_copy(update={"gate": now.gate})
        for before, now in zip(theirs.context.stages, stages[:stage], strict=False)
    ]
    context = theirs.context.model_copy(update={"stages": (*earlier, *stages[stage:])})
    unread = {name: source for name, source in ours.data.sources.items() if name not in theirs.data.sources}
    for settings in stages[:stage]:
        read = settings.mixture or {name: source.weight for name, source in ours.data.sources.items()}
        unread = {name: source for name, source in unread.items() if not read.get(name)}
    data = theirs.data.model_copy(update={"sources": {**theirs.data.sources, **unread}})
    theirs = theirs.model_copy(update={"context": context, "data": data})
    lines = differences(_with_freedom(theirs, ours, MAY_DIFFER), ours)
    return [line for line in lines if not may_change(line)]


def _asks_alike(theirs: "RunConfig", ours: "RunConfig") -> bool:
    """Whether both ask the same at the end of a stage; how often they ask besides is no matter."""
    times = {key: getattr(ours.evals, key) for key in ("every_tokens", "at_stage_ends", "at_stage_starts")}
    return theirs.evals.model_copy(update=times) == ours.evals and theirs.data == ours.data


def _with_freedom(theirs: "RunConfig", ours: "RunConfig", keys: tuple[str, ...]) -> "RunConfig":
    return theirs.model_copy(update={key: getattr(ours, key) for key in keys})


def _refuse_other_data(branch: BranchSettings, where: Path, materials: Mapping[str, str]) -> None:
    try:
        before = read_materials(where)
    except Damaged as damage:
        raise _refusal(branch, f"{damage}, so nothing says what its data was; put a good copy back") from None
    others = sorted(key for key, value in before.items() if materials.get(key) != value)
    if others:
        raise _refusal(branch, f"its data was another: {', '.join(others)}; put that data back, or train anew")


def _checkpoint_of(where: str, step: int) -> Path:
    return Path(where) / "checkpoints" / f"step_{step:08d}"


def _damaged(branch: BranchSettings, folder: Path, damage: Damaged) -> Refusal:
    return _refusal(branch, f"{folder} is damaged: {damage}; put a good copy back, or train that run again")


def _refusal(branch: BranchSettings, why: str) -> Refusal:
    return Refusal(f"branch={{ run = {branch.run!r}, stage = {branch.stage} }}: {why}")
