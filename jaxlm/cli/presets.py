"""Finds presets by name: functions of `jaxlm.presets`, and functions of the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable

from jaxlm import presets
from jaxlm.config import TrainConfig
from pallas_kernels.common.errors import UserError


def load_preset(name: str) -> TrainConfig:
  """Returns the configuration of a function of `jaxlm.presets`, or of the user's `module:function`.

  Raises UserError where there is none, or where it returns something else.
  """
  module_name, colon, function_name = name.rpartition(":")
  if colon:
    function = _find_function(name, module_name, function_name)
  elif name in _presets():
    function = _presets()[name]
  else:
    raise UserError(f"preset {name!r} does not exist; nearest: {nearest(name, _presets())}")
  config = function()
  if not isinstance(config, TrainConfig):
    kind = type(config).__name__
    raise UserError(f"preset {name!r}: returned {kind}, must return a TrainConfig")
  return config


def list_presets() -> str:
  """Returns one line for each preset: its name and what it is."""
  return "\n".join(f"  {name:<22} {function.__doc__}" for name, function in _presets().items())


def nearest(name: str, names: Iterable[str]) -> str:
  """Returns up to three of `names` that are spelt like `name`, or all of them."""
  names = list(names)
  return ", ".join(difflib.get_close_matches(name, names, n=3) or names)


def _presets() -> dict[str, Callable[[], TrainConfig]]:
  """Returns the public functions of `jaxlm.presets` that take no argument, by name."""
  return {
    name: function
    for name, function in vars(presets).items()
    if inspect.isfunction(function)
    and function.__module__ == presets.__name__
    and not name.startswith("_")
    and not inspect.signature(function).parameters
  }


def _find_function(preset: str, module_name: str, name: str) -> Callable[[], TrainConfig]:
  if not module_name or not name:
    raise UserError(f"preset {preset!r}: must be module:function, or a name without a colon")
  sys.path.insert(0, os.getcwd())
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
      raise  # the module is there, and imports something that is not
    raise UserError(f"preset {preset!r}: {error}") from error
  function = getattr(module, name, None)
  if not callable(function):
    raise UserError(f"preset {preset!r}: module {module_name} has no function {name}")
  return function
