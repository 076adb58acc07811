"""What breaks a run, and what is left of it afterwards: `python -m benchmarks.faults`."""
