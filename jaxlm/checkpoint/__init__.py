"""Writes a run's state to disk atomically, and verifies it before it is believed."""
