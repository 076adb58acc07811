"""lm-evaluation-harness (the package lm-eval) on checkpoints of ours."""
