"""Scaling laws: their constants and fits, counts of parameters and FLOPs, sweeps of runs."""
