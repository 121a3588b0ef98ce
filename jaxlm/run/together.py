"""Trains runs of one shape as one program: the training step under vmap over their states."""

# R runs

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import TrainConfig
from jaxlm.train.state import Hyper, TrainState, init_state
from jaxlm.train.step import make_train_step
from jaxlm.train.task import Start, Task
from sharding.batches import local_rows

MakeTask = Callable[[TrainConfig], tuple[TrainConfig, Task]]
"""Returns the configuration with what the data decides filled in, and its task."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Records how one of the runs ended."""

  index: int
  """which of the runs"""
  step: int
  """its last step; of a run that diverged, the first whose loss or gradient is not finite"""
  diverged: bool
  loss: float
  """of that step"""
  count: float
  """what the task's unit counts, summed over its steps"""
  evaluation: Mapping[str, float]
  """of its last weights; empty where it diverged"""
  parameters: int
  seconds: float
  """its share of the time that all of them took until then, evaluation included"""


class Together:
  """Compiles one program for runs that differ in learning rate, weight decay, steps and seed alone.

  Nothing is written. Everything is compiled once per number of runs, however often it is used.
  """

  def __init__(self, config: TrainConfig, make_task: MakeTask):
    self.make_task = make_task
    self.config, self.task = make_task(config)
    self.init = jax.jit(jax.vmap(self._init, in_axes=(0, 0, None)))
    # jitted, so that it is one program and not one for every array and index
    self.select = jax.jit(lambda state, index: jax.tree.map(lambda x: x[index], state))

  def _init(self, seed: jax.Array, hyper: Hyper, start: Start | None) -> TrainState:
    return init_state(self.config, self.task, start, seed=seed)._replace(hyper=hyper)

  @functools.cache  # noqa: B019  lives as long as the program
  def _step(self, own_batches: bool) -> Callable[..., Any]:
    """Returns the jitted step of all runs, on one batch for all or on one for each."""
    step = make_train_step(self.config, self.task)
    return jax.jit(jax.vmap(step, in_axes=(0, 0 if own_batches else None)), donate_argnums=0)

  def train(self, configs: Sequence[TrainConfig]) -> Iterator[Outcome]:
    """Trains the runs of `configs` together and yields how each ended, when it ends."""
    began = time.perf_counter()
    ends_R = np.array([config.steps for config in configs])
    seeds = [config.seed for config in configs]
    hypers = [Hyper.of(config) for config in configs]
    hyper = jax.tree.map(lambda *values: jnp.stack(values), *hypers)
    state = self.init(jnp.array(seeds, jnp.uint32), hyper, self.task.pretrained())
    train_step = self._step(len(set(seeds)) > 1)
    record = _Record(len(configs), self.task.unit, self.config.nonfinite == "stop")
    running_R = np.ones(len(configs), bool)
    for step, batch in enumerate(self._batches(seeds), start=1):
      state, metrics = train_step(state, batch)
      record.add(step, metrics)
      hopeless = not (running_R & (record.diverged_R == 0)).any()
      ending_R = running_R & ((ends_R == step) | hopeless)
      if ending_R.any():
        record.read()
      for index in np.flatnonzero(ending_R):
        yield self._outcome(int(index), state, record, began, len(configs))
      running_R &= ~ending_R
      if not running_R.any():
        return

  def _batches(self, seeds: Sequence[int]) -> Iterator[Any]:
    """Yields the batches of one seed, or a batch per run stacked on a leading axis."""
    rows = local_rows(self.config.batch)
    streams = {}
    for seed in seeds:
      if seed not in streams:
        config = dataclasses.replace(self.config, seed=seed)
        streams[seed] = self.make_task(config)[1].batches(rows)
    while True:
      batches = {seed: next(stream) for seed, stream in streams.items()}
      if len(batches) == 1:
        yield batches[seeds[0]]
      else:
        yield jax.tree.map(lambda *x: np.stack(x), *(batches[seed] for seed in seeds))

  def _outcome(
    self, index: int, state: TrainState, record: _Record, began: float, runs: int
  ) -> Outcome:
    own: TrainState = self.select(state, index)
    diverged = bool(record.diverged_R[index])
    evaluation = {}
    if not diverged:
      rows = local_rows(self.config.batch)
      evaluation = self.task.evaluate(own.weights(), own.model_state, rows)
    return Outcome(
      index=index,
      step=int(record.diverged_R[index] or record.step),
      diverged=diverged,
      loss=float(record.loss_R[index]),
      count=float(record.count_R[index]),
      evaluation=evaluation,
      parameters=sum(x.size for x in jax.tree.leaves((own.params, own.frozen))),
      seconds=(time.perf_counter() - began) / runs,
    )


class _Record:
  """Keeps the numbers of all runs, read one step late so that the devices need not wait."""

  def __init__(self, runs: int, unit: str, stop: bool):
    self.unit, self.stop = unit, stop
    self.step = 0
    self.loss_R = np.full(runs, np.nan)
    self.count_R = np.zeros(runs)
    self.diverged_R = np.zeros(runs, int)
    """the step at which a run's numbers were not finite; 0: they are"""
    self._metrics: Mapping[str, jax.Array] | None = None

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Takes the metrics of a step, and reads those of the step before."""
    self.read()
    self.step, self._metrics = step, metrics

  def read(self) -> None:
    """Waits for the newest metrics; numbers of a run that has diverged stay as they were then."""
    if self._metrics is None:
      return
    names = ("loss", "grad_norm", self.unit)
    loss_R, norm_R, count_R = jax.device_get([self._metrics[name] for name in names])
    alive_R = self.diverged_R == 0
    self.loss_R = np.where(alive_R, loss_R, self.loss_R)
    self.count_R += np.where(alive_R, count_R, 0)
    if self.stop:
      bad_R = alive_R & ~(np.isfinite(loss_R) & np.isfinite(norm_R))
      self.diverged_R[bad_R] = self.step
    self._metrics = None
