"""A run on the disk: written while it goes on, verified byte by byte, read on any layout of ranks."""
