"""Trains by pure functions of (state, batch): no files, no signals."""

from jaxlm.objectives.weighted import Weighted
from jaxlm.train.state import Hyper, TrainState, init_state
from jaxlm.train.step import make_train_step
from jaxlm.train.task import IndexedBatches, Start, Task

__all__ = [
  "Hyper",
  "IndexedBatches",
  "Start",
  "Task",
  "TrainState",
  "Weighted",
  "init_state",
  "make_train_step",
]
