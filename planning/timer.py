"""What each layer costs on a rank, by what it does: products, passes over memory, and what is sent along each axis."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from model.size import attention_layer, mean_keys_of_documents
from model.work import (
    FP32,
    FUSED_LOGIT_PASSES,
    LOGIT_PASSES,
    UPDATE_PASSES,
    WEIGHT_PASSES,
    Bytes,
    Cuts,
    Product,
    head,
    passes,
    products,
)
from parallel.cost import Line, exchange_time, gather_bytes, gather_time, line, ranks_met, reduce_time, send_time
from parallel.mesh import Axis
from planning.device import Device
from planning.speeds import Framework
from planning.step_parts import Job, Part, Stage, Work, merge


class Timer:
    """What each layer costs on a rank of this job."""

    def __init__(self, job: Job, device: Device, framework: Framework) -> None:
        self.job, self.device, self.framework, self.speeds = job, device, framework, device.speeds
        self.cuts = Cuts(job.grid.tensor, job.grid.expert)
        self.held = Bytes(framework.stream, device.dtype.itemsize, framework.is_fused)
        self._layers: dict[tuple[str, str], list[Part]] = {}

    def microbatch(self, stage: Stage) -> list[Part]:
        """Forward and backward of a rank's layers."""
        alike = Counter((self.job.model.view(layer), self.job.model.feed_forward_kind(layer)) for layer in stage.layers)
        parts = [part.times(number) for kind, number in alike.items() for part in self._layer(kind)]
        parts += self.ends(stage)
        if self.job.grid.pipeline > 1:
            parts.append(self.sends())
        hidden = sum(part.hidden for part in parts if part.is_sent)
        return merge([*parts, Part("slower beside what is sent", self.speeds.contention * hidden)])

    def _layer(self, kind: tuple[str, str]) -> list[Part]:
        """What a layer of this view and feed-forward takes, worked out once for all that are alike."""
        if kind not in self._layers:
            model = self.job.model
            layers = range(model.num_layers)
            self._layers[kind] = merge(
                self.layer(next(n for n in layers if (model.view(n), model.feed_forward_kind(n)) == kind))
            )
        return self._layers[kind]

    def layer(self, layer: int) -> list[Part]:
        """What one layer takes in a micro-batch, and what of that is sent."""
        job, again = self.job, self.job.repeats
        made = list(products(job.model, layer, job.tokens, self.cuts))
        by_kind = merge(Part(product.kind, self.product(product), work=self.work(product)) for product in made)
        multiplied, looked = merge(replace(part, name="") for part in by_kind)[0], self.scores(layer)
        passed = self.passing("", job.tokens * sum(passes(job.model, layer, self.cuts, self.held).values()))
        weights = sum(product.weights for product in made)
        forward = _sum("counted beforehand", multiplied, looked, passed)
        repeated = _sum(
            "recomputed",
            *(multiplied.times(again.products), looked.times(again.attention), passed.times(again.passes)),
            *self.experts_again(made),
        )
        backward = 2 * multiplied.seconds + 2.5 * looked.seconds + 2 * passed.seconds + repeated.seconds
        shared = sum(part.seconds for part in by_kind if part.name == "shared experts")
        return [
            *(part.times(3) for part in by_kind),
            looked.times(3.5),
            _sum("passes over memory", passed.times(3), self.passing("", WEIGHT_PASSES * weights)),
            repeated,
            forward.times((job.microbatches - 1) / job.microbatches if job.counts_first else 0.0),
            *self.shards(made, forward.seconds, backward),
            *self.exchanges(layer, shared),
            *self.tokens_of_tensor_ranks(),
            *self.rows(layer, looked.seconds),
        ]

    def ends(self, stage: Stage) -> Iterator[Part]:
        """The head and its loss; what sharding sends for both ends stands in nobody's shade."""
        job, framework = self.job, self.framework
        weights = 0.0
        if stage.has_head:
            made = head(job.model, job.vocab_size, job.tokens, self.cuts)
            weights += made.weights
            per_logit = FUSED_LOGIT_PASSES if framework.is_loss_fused else LOGIT_PASSES
            yield Part("head", self.product(made), work=self.work(made)).times(3)
            yield self.passing("passes over memory", per_logit * job.tokens * made.outer + WEIGHT_PASSES * weights)
        if stage.has_embedding and not (job.model.tied_embeddings and stage.has_head):
            weights += job.model.width * job.vocab_size / job.grid.tensor
        along = self.line("shard")
        if along.length > 1 and weights:
            size = weights * (framework.gathered_ends + framework.reduced)
            sent = gather_bytes(along, size)
            yield Part("shard", gather_time(along, size) + along.latency, 0.0, sent, True, ring(along, sent))

    def shards(self, made: list[Product], forward: float, backward: float) -> Iterator[Part]:
        """Weights gathered behind the layer before, forward and backward, and gradients cut up behind the next."""
        groups: tuple[tuple[Axis, Callable[[Product], bool]], ...] = (
            ("shard", lambda product: product.kind != "experts"),
            ("expert_shard", lambda product: product.kind == "experts"),
        )
        gathers = scatters = sent = 0.0
        wires = Work()
        is_kept = not self.framework.reshards or self.job.grid.pipeline > 1
        once = 0.0 if is_kept else 1.0
        gathered = 1 / self.job.microbatches if is_kept else 2.0
        scattered = 1 / self.job.microbatches if self.job.grid.pipeline > 1 else 1.0
        for axis, belongs in groups:
            along, weights = self.line(axis), sum(product.weights for product in made if belongs(product))
            if along.length == 1 or not weights:
                continue
            there, back = weights * self.framework.gathered, weights * self.framework.reduced
            gathers += gather_time(along, there)
            scatters += gather_time(along, back)
            sent += gather_bytes(along, (1 + once) * there + back)
            wires += ring(along, gather_bytes(along, gathered * there + scattered * back))
        if not sent:
            return
        if is_kept:  # gathered once for all micro-batches
            gathers /= self.job.microbatches
        if self.job.grid.pipeline > 1:  # where gradients stay whole until the last of them
            scatters /= self.job.microbatches
        hidden = min(gathers, forward) + min(once * gathers + scatters, backward)
        yield Part("shard", (1 + once) * gathers + scatters, hidden, sent, True, wires)

    def exchanges(self, layer: int, shared: float) -> Iterator[Part]:
        """Tokens to their experts and home, forward and backward; shared experts compute while they travel."""
        job, along = self.job, self.line("expert")
        moe = job.model.moe
        if along.length == 1 or moe is None or job.model.feed_forward_kind(layer) == "dense":
            return
        row = job.model.width * self.device.dtype.itemsize + (8 * moe.experts_per_token)
        inside, across = self.travels(along, moe.num_experts, moe.experts_per_token)
        one = exchange_time(along, job.tokens * row * inside, job.tokens * row * across)
        legs = 4 + 2 * job.repeats.exchange
        if job.counts_first:
            legs += 2 * (job.microbatches - 1) / job.microbatches
        hidden = min(one, shared) + min(one, 2 * shared)
        links, sizes = along.links, (legs * job.tokens * row * inside, legs * job.tokens * row * across)
        wires = Work(0.0, 0.0, sizes[0] / links.inside.bandwidth, sizes[1] / links.across.bandwidth)
        yield Part("expert", legs * one, hidden, sum(sizes), True, wires)

    def travels(self, along: Line, num_experts: int, chosen: int) -> tuple[float, float]:
        """(copies of a token to ranks of its node, to others)."""
        met = ranks_met(along.length, num_experts, chosen)
        if self.framework.dispatch == "node" and along.nodes > 1:
            nodes = ranks_met(along.nodes, num_experts, chosen)
            return met, nodes * (along.nodes - 1) / along.nodes
        each = met / along.length
        return each * (along.inside - 1), each * (along.length - along.inside)

    def tokens_of_tensor_ranks(self) -> Iterator[Part]:
        """Tokens gathered before each half of a layer and shared out behind it; backward the same, turned round."""
        along, job = self.line("tensor"), self.job
        if along.length == 1:
            return
        there, back = (job.tokens * job.model.width * c for c in (self.framework.tensor_in, self.framework.tensor_out))
        one, size = gather_time(along, there) + gather_time(along, back), gather_bytes(along, there + back)
        often = 4 + 2 * min(job.repeats.products, 1.0)
        if job.counts_first:
            often += 2
        yield Part("tensor", often * one, 0.0, often * size, True, ring(along, often * size))

    def rows(self, layer: int, scores: float) -> Iterator[Part]:
        """Keys, values and their gradients, behind the scores of what is already there."""
        job = self.job
        if job.context == 1:
            return
        along, sent = self.line("context"), job.volumes[job.model.view(layer)]
        forward, backward = (send_time(along, size) for size in (sent.forward, sent.backward))
        hidden = min(forward, scores) + min(backward, 2.5 * scores)
        size = sent.forward + sent.backward
        yield Part("context", forward + backward, hidden, size, True, to_neighbour(along, size))

    def sends(self) -> Part:
        """Tokens to the next rank of a pipeline, and gradients back, for each part of the model on a rank."""
        job, along = self.job, self.line("pipeline")
        size, often = job.tokens * job.model.width * self.framework.stream / job.grid.tensor, 2 * job.parts
        work = to_neighbour(along, often * size)
        return Part("pipeline", often * send_time(along, size), 0.0, often * size, True, work)

    def once(self, microbatch: list[Part]) -> Iterator[Part]:
        """What is done once a step: gradients of replicas added up, and weights updated."""
        job, framework = self.job, self.framework
        dense, experts = self.own_weights()
        pairs: tuple[tuple[float, Axis], ...]
        if job.grid.shard > 1:
            pairs = ((dense, "replicate"), (experts, "expert_replicate"))
        else:
            pairs = ((dense, "data"), (experts, "expert_replicate"))
        seconds = sent = 0.0
        work = Work()
        for weights, axis in pairs:
            along = self.line(axis)
            if along.length > 1 and weights:
                size = 2 * gather_bytes(along, weights * framework.reduced)
                seconds, sent = seconds + reduce_time(along, weights * framework.reduced), sent + size
                work += ring(along, size)
        is_behind = framework.overlaps_replicas or job.grid.shard > 1
        backward = sum(part.exposed for part in microbatch if not part.is_sent) * 2 / 3
        yield Part("replicate", seconds, min(seconds, backward) if is_behind else 0.0, sent, True, work)
        yield self.passing("update", UPDATE_PASSES * (dense + experts))

    def own_weights(self) -> tuple[float, float]:
        """(all but experts, experts) that lie on a rank, of the stage with the most layers."""
        grid, model = self.job.grid, self.job.model
        layers = range(math.ceil(model.num_layers / grid.pipeline))
        every = [p for layer in layers for p in products(model, model.num_layers - 1 - layer, 1, self.cuts)]
        experts = sum(p.weights for p in every if p.kind == "experts") / grid.length("expert_shard")
        ends = model.width * self.job.vocab_size / grid.tensor
        ends *= 2 if grid.pipeline == 1 and not model.tied_embeddings else 1
        dense = sum(p.weights for p in every if p.kind != "experts") + ends
        return dense / grid.shard, experts

    def product(self, product: Product) -> float:
        """Seconds of one forward product."""
        speeds = self.speeds
        if product.kind == "router":  # so slow that its edges do not tell
            return product.flops / (self.device.peak * speeds.product * speeds.fp32)
        edges = 1 + speeds.side * (1 / product.rows + 1 / product.inner + 1 / product.outer)
        return product.flops * edges / (self.device.peak * speeds.product)

    def work(self, product: Product) -> Work:
        """Of one forward product: its operations, and what goes in and comes out; tokens of routers are passes."""
        if product.kind == "router":
            return Work(product.flops, FP32 * product.weights)
        M, K, N = product.rows, product.inner, product.outer
        return Work(product.flops, self.held.product * product.groups * (M * K + K * N + M * N))

    def experts_again(self, made: list[Product]) -> Iterator[Part]:
        """Where experts keep their input alone, their first product is made once more."""
        moe = self.job.model.moe
        if moe is not None and moe.recompute != "none" and self.job.repeats.products != 1:
            first = [product for product in made if product.kind == "experts"][:1]
            yield from (Part("", self.product(product), work=self.work(product)) for product in first)

    def scores(self, layer: int) -> Part:
        """One layer's scores forward; through memory go at least queries and answers."""
        job, model, speeds = self.job, self.job.model, self.speeds
        seen = [window for window in (model.window(layer), job.window) if window is not None]
        window = min(seen, default=None)
        channels = attention_layer(model).channels / job.grid.tensor
        flops = 2 * job.tokens * channels * mean_keys_of_documents(job.lengths, window)
        longest = sum(n * min(n, window or n) for n in job.lengths) / sum(job.lengths)
        share = speeds.attention[self.framework.attention] * longest / (longest + speeds.half_length)
        work = Work(flops, job.tokens * channels * self.held.product)
        return Part("attention scores", flops / (self.device.peak * share), work=work)

    def passing(self, name: str, size: float) -> Part:
        """So many bytes moved to or from memory."""
        return Part(name, size / (self.device.memory_bandwidth * self.speeds.memory), work=Work(0.0, size))

    def line(self, axis: Axis) -> Line:
        return line(self.job.grid, axis, self.device.links, self.job.context)


def ring(along: Line, size: float) -> Work:
    """So many bytes sent by each rank of a ring, whose slowest link counts."""
    seconds = size / along.bandwidth
    links = along.links
    is_inside = along.nodes == 1 or along.bandwidth == links.inside.bandwidth
    return Work(inside=seconds) if is_inside else Work(across=seconds)


def to_neighbour(along: Line, size: float) -> Work:
    """So many bytes sent to one other rank, which may be on another node where the group is."""
    if along.nodes == 1:
        return Work(inside=size / along.links.inside.bandwidth)
    return Work(across=size / along.links.across.bandwidth)


def _sum(name: str, *parts: Part) -> Part:
    """Parts as one, of this name."""
    return merge(replace(part, name=name) for part in (Part("", 0.0), *parts))[0]
