"""What is done to a finished model from outside, before it trains."""

from model.feed_forward import FeedForward
from model.norm import RMSNorm
from model.transformer import Transformer


def prepare_layers(model: Transformer, *, compile: bool, recompute: bool) -> Transformer:
    """Recompute activations layer by layer in the backward pass, and compile what has fixed shapes.

    Compiled are the norms and dense feed-forwards: their shapes never change within a stage, while the lengths of
    packed documents and the rows of an expert differ from step to step and would be compiled anew each time.
    """
    model.recompute = recompute
    if compile:
        for module in model.modules():
            if isinstance(module, FeedForward | RMSNorm):
                module.compile()
    return model
