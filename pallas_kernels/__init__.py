"""Holds kernels, one folder per operation.

The root imports nothing, so that no name is both a module and a function.
"""
