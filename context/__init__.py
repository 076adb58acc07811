"""Context: where a token stands (rotary) and how the length grows during a run (stages)."""
