"""Measurements: each prints ratios from one run, and with --out keeps them under benchmarks/results/."""
