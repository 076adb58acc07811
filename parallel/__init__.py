"""Decides who owns what, and edits a finished model from outside."""
