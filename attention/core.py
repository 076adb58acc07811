"""The table of attention backends: why one is off, and how "auto" chooses."""

from attention.contract import Backend, Capability, Needs, missing
from attention.reference import Reference
from attention.sdpa import Sdpa
from settings import Refusal, nearest

# In the order in which "auto" tries them.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Sdpa(), Reference())}


def choose(name: str, needs: Needs) -> Backend:
    """The backend called `name`, or the first able one for "auto"; what is asked for by name is never replaced."""
    if name != "auto":
        if name not in BACKENDS:
            raise Refusal(f"attention.backend={name!r}: unknown backend{nearest(name, ['auto', *BACKENDS])}")
        reasons = why_not(BACKENDS[name], needs)
        if reasons:
            raise Refusal(f"attention.backend={name!r}: {'; '.join(reasons)}. {_way_out(needs)}")
        return BACKENDS[name]
    for backend in BACKENDS.values():
        if not why_not(backend, needs):
            return backend
    tried = "; ".join(f"{backend.name} {', '.join(why_not(backend, needs))}" for backend in BACKENDS.values())
    raise Refusal(f"attention.backend='auto': no backend can do this: {tried}. Use another device or dtype.")


def why_not(backend: Backend, needs: Needs) -> list[str]:
    """Every reason why `backend` cannot serve `needs` on this machine; empty when it can."""
    reason = backend.unavailable()
    return ([reason] if reason else []) + missing(backend.capability, needs)


def explain() -> list[tuple[str, bool, str]]:
    """(name, whether it can run here, why not or what it does), one a backend."""
    rows = []
    for name, backend in BACKENDS.items():
        reason = backend.unavailable()
        rows.append((name, reason is None, reason or _summary(backend.capability)))
    return rows


def _way_out(needs: Needs) -> str:
    able = [backend.name for backend in BACKENDS.values() if not why_not(backend, needs)]
    return (
        f'Use backend = "{able[0]}" or "auto".' if able else "No other backend can either; use another device or dtype."
    )


def _summary(capability: Capability) -> str:
    can = {"window": capability.window, "documents": capability.documents, "training": capability.trainable}
    return f"{' and '.join(capability.devices)}; {', '.join(name for name, holds in can.items() if holds)}"


__all__ = ["BACKENDS", "Backend", "Capability", "Needs", "choose", "explain", "missing", "why_not"]
