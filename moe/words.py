"""How a model routes, in a few words: what stands beside every speed of it."""

from moe.choice import ExpertChoiceSettings, RandomSettings, TokenChoiceSettings, UniformSettings
from moe.layer import MoESettings


def routing_in_words(moe: MoESettings | None) -> str:
    """`top-2 of 8, learned`, `top-2 of 8, hash`, `top-2 of 8, random (control)`, `expert choice, 2 of 8`, `dense`.

    Behind that what takes rows away or adds some: `capacity 1.25`, `4 null`, `1 shared`.
    """
    if moe is None:
        return "dense"
    told = [*_choice(moe)]
    if moe.capacity is not None:
        told.append(f"capacity {moe.capacity.factor:g}")
    if moe.null_experts is not None:
        told.append(f"{moe.null_experts.count} null")
    if moe.num_shared_experts:
        told.append(f"{moe.num_shared_experts} shared")
    return ", ".join(told)


def _choice(moe: MoESettings) -> tuple[str, ...]:
    router, some = moe.router, f"{moe.experts_per_token} of {moe.num_experts}"
    if isinstance(router, ExpertChoiceSettings):
        return "expert choice", some
    if isinstance(router, TokenChoiceSettings):
        groups = router.groups
        return f"top-{some}", *((f"{groups.keep} of {groups.count} groups",) if groups else ()), "learned"
    is_control = isinstance(router, RandomSettings | UniformSettings)
    return f"top-{some}", f"{router.kind} (control)" if is_control else router.kind
