"""Defines the errors for mistakes of the user; every other exception is a fault of the program."""

from __future__ import annotations

import importlib
from typing import Any


class UserError(ValueError):
  """Raised for what the user can mend: the message names the field, its value and the rule."""


class UnsupportedError(UserError, NotImplementedError):
  """Raised for what was asked for and nothing here can run; the message says why."""


class MissingExtraError(UserError, ImportError):
  """Raised where an optional dependency is not installed; the message names its extra."""


def import_extra(module: str, extra: str, purpose: str) -> Any:
  """Imports and returns an optional dependency.

  Raises MissingExtraError with the pip line where the package is not installed. A package that is
  installed but broken raises its own error.
  """
  package = module.partition(".")[0]
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != package:
      raise
    message = f"{purpose} needs {package}, which is not installed: pip install 'jaxlm[{extra}]'"
    raise MissingExtraError(message) from error
