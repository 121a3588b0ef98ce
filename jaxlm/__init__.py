"""Trains language models in JAX: configuration, models, data, runs and the command line."""
