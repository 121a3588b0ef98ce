"""Kernels, one folder per operation; the root imports nothing, so no name is module and function."""
