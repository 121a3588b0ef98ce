"""Runs training from start to end: `fit` any task, `train` text; `SavedRun` opens a run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxlm.run.loop import TrainResult
  from jaxlm.run.saved_run import SavedRun
  from jaxlm.run.start import fit
  from jaxlm.run.text import resume, train

__all__ = ["SavedRun", "TrainResult", "fit", "resume", "train"]

_HOMES = {
  "SavedRun": "saved_run",
  "TrainResult": "loop",
  "fit": "start",
  "resume": "text",
  "train": "text",
}


def __getattr__(name: str) -> Any:
  """Imports a public name when it is first used.

  What only reads a run's files (`jaxlm checkpoint verify`) thus starts without jax.
  """
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
