"""Counts parameters and FLOPs, and sweeps over hyperparameters."""
