"""Attention: what may be seen (mask), how it is computed (core, backends), and the module that owns weights."""
