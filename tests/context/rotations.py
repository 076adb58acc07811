"""One rotation of each kind, for tests that hold for all of them."""

import pytest

from context.rotary import (
    AbfRotary,
    DefaultRotary,
    DynamicRotary,
    LinearRotary,
    Llama3Rotary,
    LongRotary,
    NoRotary,
    NtkRotary,
    ProportionalRotary,
    YarnRotary,
)

B = 1e4
PLAIN = DefaultRotary(base=B)
SLOWER = tuple(1.0 + pair / 4 for pair in range(16))
SPECS = {
    "default": PLAIN,
    "default_share": DefaultRotary(base=B, share=0.5),
    "linear": LinearRotary(base=B, factor=4),
    "ntk": NtkRotary(base=B, factor=4),
    "dynamic": DynamicRotary(base=B, factor=4, original_length=128, length=512),
    "yarn": YarnRotary(base=B, factor=4, original_length=128),
    "yarn_share": YarnRotary(base=B, factor=4, original_length=128, share=0.75),
    "yarn_rotations": YarnRotary(base=B, factor=4, original_length=128, ramp="rotations"),
    "llama3": Llama3Rotary(base=B, factor=4, original_length=128),
    "longrope": LongRotary(base=B, factor=4, original_length=128, short=(1.0,) * 16, long=SLOWER, use="long"),
    "abf": AbfRotary(base=50 * B),
    "proportional": ProportionalRotary(base=B, pairs=0.25),
    "none": NoRotary(),
}
"""For heads of 32 channels."""
every_kind = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
