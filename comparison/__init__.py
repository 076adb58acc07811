"""Runs made to differ in one thing, trained, and what they show beside each other."""
