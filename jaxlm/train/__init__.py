"""Training: `train(config)` is the whole run, `resume(folder)` goes on with one, `SavedRun` opens one for use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxlm.train.loop import TrainResult, resume, train
  from jaxlm.train.saved_run import SavedRun

__all__ = ["SavedRun", "TrainResult", "resume", "train"]

_HOMES = {"TrainResult": "loop", "resume": "loop", "train": "loop", "SavedRun": "saved_run"}


def __getattr__(name: str) -> Any:
  """Imported when first asked for: what only reads a run's files (`jaxlm checkpoint verify`) starts without jax."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
