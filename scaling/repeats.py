"""What tokens are worth that are seen again (Muennighoff et al. 2023, section 4.1)."""

import math

HALF_LIFE = 15.39
"""R*: after so many repetitions a further one is worth 1 / e of a first one (there, section 6)."""


def worth(unique: float, epochs: float, half_life: float = HALF_LIFE) -> float:
    """Unique tokens that `epochs` passes over so many are worth: U + U R* (1 - e^(-R / R*)), R = epochs - 1."""
    repeats = max(epochs - 1.0, 0.0)
    seen_once = unique * min(epochs, 1.0)
    return seen_once + unique * half_life * -math.expm1(-repeats / half_life)
