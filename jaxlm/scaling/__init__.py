"""Scaling: parameter and FLOP counts."""
