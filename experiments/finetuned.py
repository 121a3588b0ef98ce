"""Small text models that train on in few bits, from weights that were trained in full precision."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import small_text
from experiments.small_quantized import quantized, shape
from experiments.study import Scale
from jaxlm.config import TrainConfig, check
from jaxlm.quant.scales import start_scales
from jaxlm.recipes import Rules
from jaxlm.run.text import TextTask
from jaxlm.scaling.grid import with_fields
from jaxlm.train.state import Hyper, TrainState, init_state
from jaxlm.train.step import make_train_step
from jaxlm.train.task import Start
from sharding import make_mesh

RATE = {"smoke": 0.01, "cpu": 0.01, "gpu": 0.004}
"""peak learning rate of weights that are drawn; a third of it for those that are trained already"""
SETTING = (
  "Decoders (RMSNorm, rotary embedding, SwiGLU of width 2 D, untied head) on bytes of the "
  "interpreter's own standard library; 6 % of its bytes, as whole files, are held out, and 65,536 "
  "of them evaluated. AdamW, beta2 0.98, clipping at 1, float32, 1,024 bytes a step; from drawn "
  "weights a peak rate of 0.01 after 20 steps of warm-up and weight decay 0.1, from trained "
  "weights a third of that rate without warm-up and without decay; each phase has a cosine to 0 of "
  "its own, and no byte is read twice. Weights of all seven matrices of a layer are rounded; "
  "inputs, embedding and head are not."
)


class Setup(NamedTuple):
  """Says which run a row belongs to; its fields are columns "task.NAME"."""

  D: int
  layers: int
  steps: int
  """in full precision, or of both phases"""
  seed: int

  def columns(self) -> dict[str, int]:
    """Returns the columns of a table."""
    return {f"task.{name}": value for name, value in self._asdict().items()}


def from_scratch(scale: Scale, setup: Setup, steps: int) -> TrainConfig:
  """Returns the run of so many steps from drawn weights."""
  config = small_text.base(scale, schedule="cosine", learning_rate=RATE[scale])
  return with_fields(config, shape(setup.D, setup.layers) | {"steps": steps, "seed": setup.seed})


def from_trained(scale: Scale, setup: Setup, steps: int) -> TrainConfig:
  """Returns the run of so many steps from trained weights."""
  config = from_scratch(scale, setup, steps)
  fields = {"learning_rate": RATE[scale] / 3, "warmup": 0, "weight_decay": 0.0}
  optimizer = dataclasses.replace(config.optimizer, **fields)
  return dataclasses.replace(config, optimizer=optimizer)


@functools.cache
def full_precision(scale: Scale, setup: Setup, steps: int) -> Any:
  """Returns the weights after so many steps in full precision."""
  return train(from_scratch(scale, setup, steps))


class Program(NamedTuple):
  """Holds what runs of equal shape share: their task, and its compiled functions."""

  task: TextTask
  init: Callable[..., TrainState]
  step: Callable[..., tuple[TrainState, Any]]


def train(
  config: TrainConfig, rules: Rules = (), params: Any = None, *, first_step: int = 0
) -> Any:
  """Returns the weights after `config.steps` steps under these rules.

  They start from `params`, with learned scales at their first values, or are drawn by the seed. The
  text is read from where `first_step` steps have left it, so that no row is read twice.
  """
  task, init, step = program(config, rules)
  if params is not None:
    params = start_scales(task.config.model, params)
  rows = config.batch * (first_step + config.steps)
  rule = f"reads {rows} rows, the text has {len(task.text.train)}"
  check(rows <= len(task.text.train), "steps", config.steps, rule)
  own = TextTask(dataclasses.replace(task.config, seed=config.seed), task.text)
  batches = own.batches(slice(0, config.batch))
  batches.set_state({"next_row": first_step * config.batch})
  with jax.set_mesh(make_mesh(config.mesh)):
    state = init(params, config.seed)._replace(hyper=Hyper.of(config))
    for batch in itertools.islice(batches, config.steps):
      state, _ = step(state, batch)
    return jax.device_get(state.params)


def heldout_loss(
  config: TrainConfig, params: Any, rules: Rules = (), batches: int | None = None
) -> float:
  """Returns the held-out loss of weights under these rules, of so many batches, in nats per byte.

  Learned scales that the weights lack are at their first values.
  """
  task, _, _ = program(config, rules)
  if jax.tree.structure(params) != jax.tree.structure(task.roles(params)):
    params = start_scales(task.config.model, params)
  limit = batches or config.eval_batches
  with jax.set_mesh(make_mesh(config.mesh)):
    return task.evaluate(params, {}, slice(0, config.batch), limit)["heldout_loss"]


def program(config: TrainConfig, rules: Rules) -> Program:
  """Returns what runs share that differ in seed, steps and learning rate alone."""
  optimizer = dataclasses.replace(config.optimizer, learning_rate=1.0)
  steps = config.optimizer.warmup + 1
  return _program(dataclasses.replace(config, seed=0, steps=steps, optimizer=optimizer), rules)


@functools.cache
def _program(config: TrainConfig, rules: Rules) -> Program:
  config, task = quantized(config, rules)
  assert isinstance(task, TextTask)

  @jax.jit
  def init(params: Any, seed: jax.Array) -> TrainState:
    return init_state(config, task, None if params is None else Start(params), seed)

  return Program(task, init, jax.jit(make_train_step(config, task), donate_argnums=0))


def relative_change(before: Any, after: Any) -> tuple[float, float]:
  """Returns the L1 and L2 norms of how the matrices of all layers changed, over those before.

  Both are means over matrices.
  """
  pairs = zip(*(_matrices(params["stacks"]) for params in (before, after)), strict=True)
  ratios = [
    [np.linalg.norm(y - x, p) / np.linalg.norm(x, p) for p in (1, 2)]
    for x, y in ((x.ravel(), y.ravel()) for x, y in pairs)
  ]
  l1, l2 = np.mean(ratios, axis=0)
  return float(l1), float(l2)


def _matrices(stacks: Any) -> list[np.ndarray]:
  """Returns the matrices of all layers, each [D, F]."""
  leaves = jax.tree_util.tree_leaves_with_path(stacks)
  return [
    np.asarray(w_DF)
    for path, w_RDF in leaves
    if path[-1].key == "weight" and w_RDF.ndim == 3
    for w_DF in w_RDF
  ]
