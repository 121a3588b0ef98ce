"""Turns text into batches of tokens."""
