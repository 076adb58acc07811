"""Text to batches: tokenizers, shards, order, mixture, packing, and needles in a haystack."""
