"""A run's life: start-up, configuration, checkpoints, metrics, reports, and what this machine can do."""
