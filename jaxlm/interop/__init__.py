"""Reads and writes weights in other libraries' formats."""
