"""Attention: what may be seen (mask), how it is computed (contract, core, backends), one function, and the layers."""
