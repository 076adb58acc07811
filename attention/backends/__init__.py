"""The ways to compute attention, one a file, and what several of them share."""
