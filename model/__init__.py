"""The parts put together: a pre-norm decoder, its loss, its size, its first weights and its generation."""
