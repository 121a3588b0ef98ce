"""Runs the command line: `jaxlm COMMAND`, also `python -m jaxlm`.

`main` finds the command and turns mistakes of the user into one line and an exit status. Each
command parses its flags first and imports jax only when it runs.
"""

from jaxlm.cli.commands import COMMANDS, RESUMABLE, main

__all__ = ["COMMANDS", "RESUMABLE", "main"]
