"""The fastest way to share a run out among so many ranks: every mesh that the configuration allows, timed and weighed.

What is searched: `parallel.{shard,expert,context,tensor,pipeline}` (replicas are what is left), tokens of a
micro-batch, and what is computed again. Three things are taken to hold on one mesh, so that not everything has to be
timed: smaller micro-batches, recomputing more, and more ranks to a row are never faster. So candidates are taken in
the order of their time, and only those that do not fit are followed by their slower kin. Memory is worked out for
those alone that no faster one has made needless.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

from context.lengths import divisors
from context.stages import Stage
from model.block import Kind
from model.memory import memory
from model.share import States
from model.size import Size, count
from parallel.mesh import Grid, ParallelSettings, grid_of
from parallel.pipeline import check_microbatches
from planning.device import Device
from planning.jobs import framework_of, job_of
from planning.step_parts import StepTime
from planning.step_time import step_time
from run.config import RunConfig, rows_of_step
from run.needs import needs_of, share_of
from settings import Refusal

WAYS: tuple[Kind, ...] = ("none", "ops", "full")
"""What is computed again, the fastest first."""
MOST_TIMED = 20_000
"""Candidates that are timed, at most."""
CHECKS = ("check_steps", "check_parallel")
"""Of a configuration, those that depend on what is searched; all of them look at what is shown."""
FP32 = 4


@dataclass(frozen=True)
class Candidate:
    """One way to share a run out."""

    parallel: ParallelSettings
    tokens_per_microbatch: int
    recompute: Kind

    def of(self, config: RunConfig) -> RunConfig:
        """The run shared out like this, not yet checked as a whole."""
        return config.model_copy(update=dict(vars(self)))


@dataclass(frozen=True)
class Found:
    """A candidate that fits."""

    candidate: Candidate
    config: RunConfig
    steps: tuple[StepTime, ...]
    """The longest of each stage."""
    seconds: float
    """Of the whole run."""
    bytes: float
    """On the rank that needs most."""


Queue = list[tuple[float, str, Candidate, tuple[StepTime, ...]]]
"""By time; the text before a candidate decides between those of one time, the same on every machine."""


@dataclass
class Search:
    """The search for one number of ranks, and what it met with."""

    config: RunConfig
    vocab_size: int
    num_ranks: int
    device: Device
    room: float
    """Bytes that a rank may fill."""
    meshes: int = 0
    refused: int = 0
    """Meshes that the configuration cannot be shared out on."""
    too_small: int = 0
    """Meshes on which weights and moments alone do not fit."""
    timed: int = 0
    too_large: int = 0
    """Candidates that are no slower than what was found, and do not fit."""
    _seen: set[str] = field(default_factory=set)

    def best(self, number: int) -> list[Found]:
        """So many that fit, fastest first, of meshes that differ in more than `context`; fewer if there are no more."""
        found: dict[str, Found] = {}
        queue: Queue = []
        self._push(queue, self.roots())
        while queue and len(found) < number:
            time, _, candidate, steps = heapq.heappop(queue)
            mesh = candidate.parallel.model_copy(update={"context": 1}).model_dump_json()
            if mesh in found:
                continue
            needed = self.needed(candidate)
            if needed <= self.room:
                found[mesh] = Found(candidate, candidate.of(self.config), steps, time, needed)
                continue
            self.too_large += 1
            self._push(queue, self.slower(candidate))
            self._push(queue, self.wider(candidate.parallel))
        return list(found.values())

    def _push(self, queue: Queue, new: Iterator[Candidate]) -> None:
        for candidate in new:
            key = repr(candidate)
            if key in self._seen or self.timed >= MOST_TIMED:
                continue
            self._seen.add(key)
            steps = self.steps(candidate)
            if steps is not None:
                self.timed += 1
                heapq.heappush(queue, (self.seconds(steps), key, candidate, steps))

    def roots(self) -> Iterator[Candidate]:
        """Of each mesh that is possible, what is fastest on it."""
        for parallel in self.parallels():
            self.meshes += 1
            if self.least_states(self.grid(parallel)) > self.room:
                self.too_small += 1
                continue
            candidates = list(self.fastest(parallel))
            if self.is_mixed:  # then more ranks to a row may go with larger micro-batches
                candidates += [each for wider in self.contexts(parallel) for each in self.fastest(wider)]
            self.refused += not candidates
            yield from candidates

    def parallels(self) -> Iterator[ParallelSettings]:
        """Every mesh of so many ranks, as far as a glance tells, with the fewest ranks to a row that can be."""
        model = self.config.model
        experts = divisors(model.moe.num_experts) if model.moe else [1]
        for tensor in (t for t in divisors(self.num_ranks) if model.attention.num_heads % t == 0):
            for pipeline in (p for p in divisors(self.num_ranks // tensor) if p <= model.num_layers):
                data = self.num_ranks // (tensor * pipeline)
                for shard in divisors(data):
                    for expert in (e for e in experts if data % e == 0 and max(e, shard) % min(e, shard) == 0):
                        axes = {"tensor": tensor, "pipeline": pipeline, "shard": shard, "expert": expert, "context": 1}
                        axes["replicate"] = data // shard
                        yield self.config.parallel.model_copy(update=axes)

    def fastest(self, parallel: ParallelSettings) -> Iterator[Candidate]:
        """With as few ranks to a row as can be: the largest micro-batch, and of a pipeline all of them."""
        sizes = [each for each in self.sizes(parallel) if self.is_possible(Candidate(parallel, each, WAYS[0]))]
        for size in sizes if parallel.pipeline > 1 else sizes[:1]:
            yield Candidate(parallel, size, WAYS[0])
        if not sizes:
            yield from self.wider(parallel)

    def wider(self, parallel: ParallelSettings) -> Iterator[Candidate]:
        """What is fastest on the same mesh with the next more ranks to a row."""
        for wider in islice(self.contexts(parallel), 1):
            yield from self.fastest(wider)

    def contexts(self, parallel: ParallelSettings) -> Iterator[ParallelSettings]:
        """The same mesh with more ranks to a row, as far as not every stage says that itself."""
        if not all(stage.settings.context for stage in self._stages):
            more = (size for size in divisors(self.grid(parallel).data) if size > parallel.context)
            yield from (parallel.model_copy(update={"context": size}) for size in more)

    @property
    def is_mixed(self) -> bool:
        """Whether some stage says itself how many ranks hold a row."""
        return any(stage.settings.context for stage in self._stages)

    def slower(self, candidate: Candidate) -> Iterator[Candidate]:
        """On the same mesh, what keeps the next less: a smaller micro-batch, or more that is computed again."""
        sizes, way = self.sizes(candidate.parallel), WAYS.index(candidate.recompute)
        smaller = [each for each in sizes if each < candidate.tokens_per_microbatch]
        for size in smaller:
            less = replace(candidate, tokens_per_microbatch=size)
            if self.is_possible(less):
                yield less
                break
        if way + 1 < len(WAYS):
            yield replace(candidate, recompute=WAYS[way + 1])

    def sizes(self, parallel: ParallelSettings) -> list[int]:
        """Tokens of a micro-batch that go into the first stage's step, in rows of any stage; largest first."""
        first, longest = self._stages[0], max(stage.sequence_length for stage in self._stages)
        groups = self.grid(parallel).data // (first.settings.context or parallel.context)
        rows, rest = divmod(first.tokens_per_step, max(groups, 1) * longest)
        return [] if rest or not groups else [longest * number for number in reversed(divisors(rows))]

    def is_possible(self, candidate: Candidate) -> bool:
        """Whether the configuration allows it, asked by its own checks."""
        config, grid = candidate.of(self.config), self.grid(candidate.parallel)
        try:
            grid_of(candidate.parallel, self.num_ranks)
            if any(grid.data % size for size in config.all_row_ranks):
                return False
            for check in CHECKS:
                getattr(config, check)()
            for step in config.stages.first_steps():
                groups = grid.data // config.row_ranks(step.stage)
                rows = rows_of_step(config, step, groups)
                each = step.num_samples // groups
                number, length = each // rows, step.sequence_length
                check_microbatches(candidate.parallel, number, each, length, step.stage.step_key)
        except ValueError:  # of which a Refusal is one
            return False
        return True

    def steps(self, candidate: Candidate) -> tuple[StepTime, ...] | None:
        """The longest step of each stage; None where it cannot be timed."""
        config, grid = candidate.of(self.config), self.grid(candidate.parallel)
        kinds, framework = (candidate.recompute,) * config.model.num_layers, framework_of(config, self.device)
        try:
            longest = [stage.longest_step() for stage in self._stages]
            jobs = [job_of(config, self.vocab_size, step, grid, (step.sequence_length,), kinds) for step in longest]
        except Refusal:
            return None
        return tuple(step_time(job, self.device, framework) for job in jobs)

    def seconds(self, steps: tuple[StepTime, ...]) -> float:
        """Of the whole run."""
        return sum(stage.num_steps * step.seconds for stage, step in zip(self._stages, steps, strict=True))

    def needed(self, candidate: Candidate) -> float:
        """Bytes of the rank that needs most; where a bound from below is above the room already, that bound."""
        config, grid = candidate.of(self.config), self.grid(candidate.parallel)
        steps = [stage.longest_step() for stage in self._stages]
        least = self.least_states(grid)
        if least <= self.room and grid.pipeline == 1:
            shares = (share_of(config, step, grid, self.device.numbers) for step in steps)
            empty, optimizer = States(0, 0), config.optimizer.kind
            least += max(
                memory(config.model, self.vocab_size, optimizer, replace(share, states=empty)).total for share in shares
            )
        if least > self.room:
            return least
        ranks, numbers = self.num_ranks, self.device.numbers
        return max(needs_of(config, self.vocab_size, step, ranks, numbers).total for step in steps)

    def least_states(self, grid: Grid) -> float:
        """What weights and moments come to on a rank at least, as if everything was cut evenly."""
        size, copies = self._size, 2 if self.config.optimizer.kind == "muon" else 3
        dense = (size.total - size.experts) / grid.shard
        experts = size.experts / (grid.expert * grid.length("expert_shard"))
        return FP32 * copies * (dense + experts) / (grid.tensor * grid.pipeline)

    def grid(self, parallel: ParallelSettings) -> Grid:
        return Grid(self.num_ranks, parallel.shard, parallel.expert, parallel.tensor, parallel.pipeline)

    @cached_property
    def _size(self) -> Size:
        return count(self.config.model, self.vocab_size)

    @cached_property
    def _stages(self) -> list[Stage]:
        return list(self.config.stages)
