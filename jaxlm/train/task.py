"""Says what is trained: initial parameters, batches, what is minimised, and its evaluation."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax

from jaxlm.objectives.weighted import Weighted
from jaxlm.train.stages import Stages


class Start(NamedTuple):
  """Holds what training starts from: three trees of arrays, in nested dicts.

  `params` are trained, `frozen` are weights that are not. `model_state` is what neither gradient
  nor optimizer touches and `Task.after_update` changes: router biases, histories of maxima.
  """

  params: Any
  frozen: Any = {}
  model_state: Any = {}


class Batches(Protocol):
  """Iterates without end over batches; its position is a small dict that JSON can hold."""

  def __next__(self) -> Any: ...

  def get_state(self) -> dict[str, Any]:
    """Returns the position."""

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a position that `get_state` gave."""


class Task(abc.ABC):
  """Tells `jaxlm.run.fit` everything that it has to know about what it trains.

  `init`, `batches` and `objective` must be given. All functions of arrays are pure: they are traced
  by jit, grad and vmap.
  """

  unit: ClassVar[str] = "examples"
  """what the denominator of the term "loss" counts; its name in metrics.jsonl"""

  @abc.abstractmethod
  def init(self, key: jax.Array) -> Start:
    """Returns what training starts from. Traced under jit, so that arrays are born sharded."""

  @abc.abstractmethod
  def batches(self, rows: Any) -> Batches:
    """Returns an iterator over training batches, each a tree of numpy arrays.

    The leading axis of every array is the batch. `rows` indexes the rows of the global batch that
    this process's devices hold (with one process: all of them).
    """

  @abc.abstractmethod
  def objective(
    self, params: Any, model_state: Any, batch: Any, key: jax.Array
  ) -> dict[str, Weighted]:
    """Returns named terms, "loss" among them; minimised is the sum of weight * num / den.

    `params` has trained and frozen weights in one tree; on a mesh they are typed so that only
    contractions may use them (`sharding.rules.defer_reduction`). `key` differs for every step and
    micro-batch. No denominator may depend on `params`.
    """

  def pretrained(self) -> Start | None:
    """Returns weights to start from in place of `init`'s, or None. Not traced."""
    return None

  calibrates: bool = False
  """whether `calibrate` has anything to do"""

  def calibrate(self, params: Any, batch: Any) -> Any:
    """Returns the initial parameters with what follows from the first batch. Not traced."""
    return params

  def roles(self, params: Any) -> Any:
    """Returns a tree like `params` of role names, by which the optimizer treats each parameter.

    Known roles are "embedding", "matrix", "head", "norm", "bias", "taps", "scale", "decayed_scale"
    (`jaxlm.train.optimizer`). By default every parameter is "other": adam's rule under muon, and no
    weight decay.
    """
    return jax.tree.map(lambda _: "other", params)

  def stages(self) -> Stages | None:
    """Returns how the task runs in pipeline stages, or None where it cannot."""
    return None

  def probe(self, params: Any, grads: Any) -> dict[str, jax.Array]:
    """Returns arrays that `check_first_step` looks at, of trained parameters and their gradients.

    They join the metrics of every step; none may be a scalar.
    """
    return {}

  def check_first_step(self, metrics: Mapping[str, Any]) -> None:  # noqa: B027  most have no probe
    """Raises UserError where the first step of a start shows that training cannot work."""

  def after_update(
    self, params: Any, model_state: Any, metrics: Mapping[str, jax.Array]
  ) -> tuple[Any, Any]:
    """Returns (params, model_state) as they are after the optimizer has moved `params`.

    `metrics` holds the mean of every term over the batch, arrays included.
    """
    return params, model_state

  def evaluate(self, params: Any, model_state: Any, rows: Any) -> dict[str, float]:
    """Returns named numbers for eval.jsonl, of the weights for use (the average, if there is one).

    `params` has trained and frozen weights in one tree; `rows` as in `batches`. Not traced.
    """
    return {}

  def flops(self, batch: Any) -> float:
    """Returns the model's FLOPs of a training step on these rows; 0 where they are not known."""
    return 0.0

  def save(self, folder: Path) -> None:  # noqa: B027  most tasks have nothing to write
    """Writes what else is needed to use the weights into a new run's folder: a tokenizer, say."""

  def matmuls(self) -> list[str]:
    """Returns lines on the formats of the matmuls, for terminal, log and environment.json."""
    return []

  def references(self) -> dict[str, float]:
    """Returns named values that the plot shows beside the loss, such as what chance reaches."""
    return {}

  def report(self) -> list[str]:
    """Returns lines on the data for terminal, log and environment.json: what was read, and not."""
    return []

  def describe(self) -> str:
    """Returns a few words on the data, for the first line of the run."""
    return type(self).__name__


class IndexedBatches:
  """Iterates over `make_batch(0)`, `make_batch(1)`, ...; its state is the next index."""

  def __init__(self, make_batch: Callable[[int], Any]):
    self.make_batch, self.next_index = make_batch, 0

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> Any:
    self.next_index += 1
    return self.make_batch(self.next_index - 1)

  def get_state(self) -> dict[str, Any]:
    """Returns the next index."""
    return {"next_index": self.next_index}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from an index that `get_state` gave."""
    self.next_index = state["next_index"]
