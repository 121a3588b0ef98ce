"""One run from start to end: `train` runs a configuration, `resume` goes on, `SavedRun` opens one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxlm.run.fit import TrainResult, resume, train
  from jaxlm.run.saved_run import SavedRun

__all__ = ["SavedRun", "TrainResult", "resume", "train"]

_HOMES = {"TrainResult": "fit", "resume": "fit", "train": "fit", "SavedRun": "saved_run"}


def __getattr__(name: str) -> Any:
  """Imported when first asked for: what only reads a run's files (`jaxlm checkpoint verify`) starts without jax."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
