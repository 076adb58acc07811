"""Mixture of experts: who is chosen, how rows travel to the experts and back, and how the load is kept even."""
