"""Context parallelism: the ranks of a group hold each row together, and attention reaches from rank to rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from attention.attending import Attending
from attention.attention import channels_per_head
from attention.kinds import AnyAttention
from attention.latent import LatentSettings
from context.comm import Comm, GroupComm
from context.methods import Split, build_method
from context.ulysses import check_heads
from context.volume import Heads
from data.batches import Batch
from model.transformer import ModelSettings, Transformer
from parallel.mesh import Mesh, ParallelSettings, SequenceSettings, group_along
from parallel.rows import fingerprint, split_batch
from parallel.world import World
from settings import Refusal


@dataclass(frozen=True)
class RowGroup:
    """The group of ranks that this one holds rows together with."""

    comm: Comm | None = None
    """None: every rank holds whole rows, and is a group of its own."""
    settings: SequenceSettings = field(default_factory=SequenceSettings)

    @property
    def size(self) -> int:
        return 1 if self.comm is None else self.comm.size

    def groups(self, data: World) -> World:
        """The ranks with tokens of their own, each group as one: what shares out a batch. Groups are neighbours."""
        return World(data.rank // self.size, data.size // self.size, data.local_rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that hold parts of the same rows."""
        return tensor if self.comm is None else self.comm.sum(tensor)

    def split(self, microbatches: Sequence[Batch], window: int | None = None) -> list[Batch]:
        """This rank's part of micro-batches that the whole group has taken; they are whole rows where it is alone.

        Raises Refusal, on every rank, where the ranks have taken different ones. window: see `split_batch`.
        """
        if self.comm is None:
            return list(microbatches)
        self.comm.check_same(fingerprint(microbatches), "the documents and tokens of a step")
        return [split_batch(batch, self.settings, self.comm.size, self.comm.rank, window) for batch in microbatches]


ALONE = RowGroup()


def build_row_groups(settings: SequenceSettings, sizes: Iterable[int], mesh: Mesh) -> dict[int, RowGroup]:
    """This rank's group of each size, of neighbours with tokens of their own.

    All at once and in one order: ranks that make groups in different orders wait for each other for good.
    """
    return {size: _row_group(settings, size, mesh) for size in sorted(sizes)}


def _row_group(settings: SequenceSettings, size: int, mesh: Mesh) -> RowGroup:
    if size == 1:
        return ALONE
    return RowGroup(GroupComm(group_along(mesh.grid.size, *mesh.grid.line("context", size))), settings)


def split_attention(model: Transformer, group: RowGroup) -> None:
    """Let every attention layer of the model reach over this group, by the method of its kind, and over no other."""
    for layer in model.modules():
        if isinstance(layer, AnyAttention):
            local = layer.attend.local if isinstance(layer.attend, Split) else layer.attend
            layer.attend = local if group.comm is None else _split(local, layer.window, group)


def _split(local: Attending, window: int | None, group: RowGroup) -> Attending:
    assert group.comm is not None
    name = group.settings.full if window is None else group.settings.window
    split = Split(local, build_method(name, group.comm, group.settings.ulysses))
    return split  # type: ignore[return-value]  # is called the same way


def farthest_view(model: ModelSettings) -> int | None:
    """How many tokens any layer of the model sees back at most; None: all."""
    windows = [model.window(layer) for layer in range(model.num_layers)]
    return None if None in windows else max(window for window in windows if window is not None)


def check_context(settings: ParallelSettings, model: ModelSettings, key: str = "parallel.context") -> None:
    """Raise ValueError where this model's rows cannot lie on several ranks as the settings say.

    key: where the number of ranks was written.
    """
    if settings.context == 1:
        return
    if model.moe is not None and model.moe.needs_whole_rows:
        which = "model.moe.capacity" if model.moe.capacity is not None else 'model.moe.router.kind="expert_choice"'
        raise ValueError(
            f"{key}={settings.context} gives a rank only a part of a row, but {which} decides by all of it; set {key}=1"
            " or route without it"
        )
    T = settings.tensor  # of whose ranks each has its share of the heads
    heads, methods = heads_of(model), {"full": settings.sequence.full, "window": settings.sequence.window}
    kinds = {kind.removesuffix("_nope") for kind in model.pattern}
    if settings.sequence.ulysses is not None and "usp" not in {methods[kind] for kind in kinds}:
        raise ValueError(
            f'parallel.sequence.ulysses={settings.sequence.ulysses} is for method "usp", which no layer uses; leave it'
            ' out or set parallel.sequence.full="usp"'
        )
    for kind in kinds:
        if methods[kind] == "ulysses":
            try:
                check_heads(heads.num_heads // T, max(heads.num_kv_heads // T, 1), settings.context)
            except Refusal as refusal:
                raise ValueError(f'{key}={settings.context}, parallel.sequence.{kind}="ulysses": {refusal}') from None


def heads_of(model: ModelSettings) -> Heads:
    """What a layer holds of a token on each rank, and sends: bf16, as is trained at lengths where it matters."""
    attention = model.attention
    if isinstance(attention, LatentSettings):  # in absorbed form: one key for all heads, in which the value lies
        channels = attention.latent_rank + attention.rope_channels
        return Heads(attention.num_heads, 1, channels, attention.latent_rank, is_latent=True)
    channels = channels_per_head(attention, model.width)
    return Heads(attention.num_heads, attention.num_kv_heads, channels, channels)
