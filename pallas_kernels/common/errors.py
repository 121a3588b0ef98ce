"""The error classes for mistakes of the user; every other exception is a fault of the program."""

from __future__ import annotations


class UserError(ValueError):
  """Something that the user can mend: the message names the field, its value and the rule."""


class UnsupportedError(UserError, NotImplementedError):
  """A combination that was asked for and that nothing here can run; the message says why."""


class MissingExtraError(UserError, ImportError):
  """An optional dependency is not installed; the message names the extra that brings it."""
