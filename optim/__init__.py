"""Which parameters get which optimizer, and the learning rate as a function of tokens."""
