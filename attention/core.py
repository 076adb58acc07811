"""The table of attention backends: why one is off, and how "auto" chooses."""

from collections.abc import Mapping

from attention.backends.blockwise import Blockwise
from attention.backends.cudnn import Cudnn
from attention.backends.efficient import Efficient
from attention.backends.flash import Flash
from attention.backends.flex import Flex
from attention.backends.reference import Reference
from attention.backends.sdpa import Sdpa
from attention.backends.triton import Triton
from attention.backends.xformers import Xformers
from attention.contract import Backend, Needs, missing
from settings import Refusal, nearest

# One line a backend; one that needs a package imports it when it is asked for the first time.
BACKENDS: dict[str, Backend] = {
    "flash": Flash(),
    "sdpa": Sdpa(),
    "triton": Triton(),
    "blockwise": Blockwise(),
    "reference": Reference(),
    "efficient": Efficient(),
    "cudnn": Cudnn(),
    "xformers": Xformers(),
    "flex": Flex(),
}

# The order in which "auto" tries them on each kind of device. What is not here runs only where it is named: our kernels
# until they have been measured on a GPU, the others because flash and sdpa cover them.
AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("sdpa", "blockwise", "reference"),
    "cuda": ("flash", "sdpa", "blockwise", "reference"),
}


def choose(name: str, needs: Needs) -> Backend:
    """The backend called `name`, or the first able one for "auto"; what is asked for by name is never replaced."""
    if name != "auto":
        reasons = why_not(BACKENDS[check_name(name)], needs)
        if reasons:
            raise Refusal(f"attention.backend={name!r}: {'; '.join(reasons)}. {_way_out(needs)}")
        return BACKENDS[name]
    candidates = _candidates(needs)
    for backend in candidates:
        if not why_not(backend, needs):
            return backend
    tried = "; ".join(f"{backend.name} {', '.join(why_not(backend, needs))}" for backend in candidates)
    raise Refusal(f"attention.backend='auto': no backend can do this: {tried}. Use another device or dtype.")


def check_name(name: str) -> str:
    """The name itself, where it is "auto" or a backend's."""
    if name != "auto" and name not in BACKENDS:
        raise Refusal(f"attention.backend={name!r}: unknown backend{nearest(name, ['auto', *BACKENDS])}")
    return name


def why_not(backend: Backend, needs: Needs) -> list[str]:
    """Every reason why `backend` cannot serve `needs` on this machine; empty when it can."""
    reason = backend.unavailable()
    return ([reason] if reason else []) + missing(backend.capability, needs)


def explain(usual: Mapping[str, Needs] | None = None) -> list[tuple[str, bool, str]]:
    """(name, whether it can run here, why not or what it is), one a backend, and for which of `usual` auto takes it."""
    taken = {what: choose("auto", needs).name for what, needs in (usual or {}).items()}
    rows = []
    for name, backend in BACKENDS.items():
        reason = backend.unavailable()
        uses = " and ".join(what for what, chosen in taken.items() if chosen == name)
        rows.append((name, reason is None, reason or summary(backend) + (f" (auto: for {uses})" if uses else "")))
    return rows


def summary(backend: Backend) -> str:
    """The first sentence that a backend says of itself."""
    return (type(backend).__doc__ or "").strip().partition("\n")[0].rstrip(".")


def _candidates(needs: Needs) -> list[Backend]:
    return [BACKENDS[name] for name in AUTO.get(needs.device, tuple(BACKENDS))]


def _way_out(needs: Needs) -> str:
    able = [backend.name for backend in (*_candidates(needs), *BACKENDS.values()) if not why_not(backend, needs)]
    return (
        f'Use backend = "{able[0]}" or "auto".' if able else "No other backend can either; use another device or dtype."
    )
