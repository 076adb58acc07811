"""What each method of attention over ranks sends, counted from the plan before anything runs; and the plan in words."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from context.layout import Layout
from context.plan import Plan, plan


@dataclass(frozen=True)
class Heads:
    """What attention of one layer holds for each token on a rank."""

    num_heads: int
    num_kv_heads: int
    channels: int
    value_channels: int
    itemsize: int = 2
    """Bytes of a number."""
    is_latent: bool = False
    """The values are the keys' first channels and do not travel beside them."""

    @property
    def kv_bytes(self) -> int:
        """Keys and values of a token, as they travel."""
        values = 0 if self.is_latent else self.value_channels
        return self.num_kv_heads * (self.channels + values) * self.itemsize

    @property
    def kv_gradient_bytes(self) -> int:
        """Their gradients, fp32 (fp64 for fp64), as they are added up on the way."""
        return self.kv_bytes // self.itemsize * max(4, self.itemsize)

    def among(self, size: int) -> "Heads":
        """The heads of one of `size` ranks that share them; key heads that are too few are there more than once."""
        return replace(self, num_heads=self.num_heads // size, num_kv_heads=max(1, self.num_kv_heads // size))


@dataclass(frozen=True)
class Volume:
    """Bytes that a rank sends for one layer and micro-batch."""

    forward: int
    backward: int

    def __add__(self, other: "Volume") -> "Volume":
        return Volume(self.forward + other.forward, self.backward + other.backward)


def ring(made: Plan, heads: Heads, rank: int) -> Volume:
    """Its keys and values at every hop that any rank needs; backward again, and their gradients as often."""
    return _sent(heads, len(made.hops) * made.layout.num_local_tokens)


def gather(made: Plan, heads: Heads, rank: int) -> Volume:
    """Its keys and values to every other rank, if any reads another's; backward again, and gradients for all others."""
    if not made.hops:
        return Volume(0, 0)
    return _sent(heads, (made.layout.num_ranks - 1) * made.layout.num_local_tokens)


def groupcast(made: Plan, heads: Heads, rank: int) -> Volume:
    """Of its keys and values what others read; backward again, and gradients for what it has read itself."""
    others = [other for other in range(made.layout.num_ranks) if other != rank]
    read = sum(keys.stop - keys.start for other in others for keys in made.keys_needed(other, rank))
    return _sent(heads, read, made.keys_received(rank))


def ulysses(layout: Layout, heads: Heads, size: int) -> Volume:
    """To each of `size` ranks that rank's heads of q, k and v, and back its tokens of the answer; backward all of this
    and the answer's gradient, and back the gradients, in fp32 those of key heads that several ranks have."""
    its = heads.among(size)
    query, out = (its.num_heads * channels * its.itemsize for channels in (its.channels, its.value_channels))
    answer = out + its.num_heads * max(4, its.itemsize)  # with its log-sum-exp
    gradients = query + (its.kv_gradient_bytes if size > heads.num_kv_heads else its.kv_bytes)
    tokens, there = (size - 1) * layout.num_local_tokens, query + its.kv_bytes
    return Volume(tokens * (there + answer), tokens * (there + out + answer + gradients))


OVER_TOKENS: dict[str, Callable[[Plan, Heads, int], Volume]] = {"ring": ring, "gather": gather, "groupcast": groupcast}


def volume(made: Plan, heads: Heads, method: str, rank: int, *, size_inside: int = 1, outside: str = "ring") -> Volume:
    """What a rank sends under a method; for usp, Ulysses in groups of `size_inside` and `outside` between them."""
    if method in OVER_TOKENS:
        return OVER_TOKENS[method](made, heads, rank)
    if method == "ulysses":
        return ulysses(made.layout, heads, made.layout.num_ranks)
    assert method == "usp", method
    joined = plan(made.layout.joined(size_inside), made.documents, made.window)
    between = OVER_TOKENS[outside](joined, heads.among(size_inside), rank // size_inside)
    return ulysses(made.layout, heads, size_inside) + between


def summary(made: Plan, heads: Heads, size_inside: int | None = None) -> str:
    """The plan in words: the cut, the balance of work, and the most that a rank sends under each method.

    size_inside: also under usp, with so many neighbours that exchange heads.
    """
    layout, ranks = made.layout, range(made.layout.num_ranks)
    busiest = max(ranks, key=lambda rank: made.work[rank])
    pieces = max(len(layout.pieces(rank)) for rank in ranks)
    tiles = max(len(made.tiles(rank)) for rank in ranks)
    documents, rows = _count(len(made.documents.lengths), "document"), _count(layout.num_rows, "row")
    lines = [
        f"{layout.num_ranks} ranks x {layout.num_local_tokens:,} tokens: {documents} in {rows}, chunks of"
        f" {layout.chunk_length:,} tokens" + (f", window {made.window:,}" if made.window else ""),
        f"work: {made.balance:.3f} most over mean (rank {busiest}: {made.work[busiest]:,} pairs), at most"
        f" {_count(pieces, 'piece')} and {_count(tiles, 'tile')} a rank",
    ]
    methods = {method: method for method in (*OVER_TOKENS, "ulysses")}
    if size_inside is not None:
        methods[f"usp (ulysses of {size_inside})"] = "usp"
    for title, method in methods.items():
        sent = [volume(made, heads, method, rank, size_inside=size_inside or 1) for rank in ranks]
        forward, backward = max(v.forward for v in sent), max(v.backward for v in sent)
        lines.append(f"{title}: at most {_size(forward)} sent by a rank forward, {_size(backward)} backward, a layer")
    return "\n".join(lines)


def _sent(heads: Heads, tokens: int, gradients: int | None = None) -> Volume:
    back = (tokens if gradients is None else gradients) * heads.kv_gradient_bytes
    return Volume(tokens * heads.kv_bytes, tokens * heads.kv_bytes + back)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
