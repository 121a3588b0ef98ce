"""Small models on tasks with known answers: what the studies of mixers train."""

# B rows, T positions, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import (
  AttentionConfig,
  ComputeConfig,
  ConvConfig,
  DataConfig,
  KdaConfig,
  LayerSpec,
  MeshConfig,
  MixerConfig,
  MlpConfig,
  ModelConfig,
  NsaConfig,
  OptimizerConfig,
  TrainConfig,
)
from jaxlm.data.packing import Batch
from jaxlm.models import Transformer, roles
from jaxlm.objectives import Weighted, next_token_loss
from jaxlm.train.task import Batches, IndexedBatches, Start, Task

Draw = Callable[[np.random.Generator, int], Batch]
"""(generator, rows) -> rows of a task"""
_TRAINING, _HELD_OUT = 1, 2


def answers_config(
  *, steps: int, batch: int, length: int, rate: float = 3e-3, on_gpu: bool = False
) -> TrainConfig:
  """Returns the run of a task with answers: AdamW, a warm-up of 5 % and a cosine, on one device."""
  return TrainConfig(
    steps=steps,
    batch=batch,
    eval_batches=4,
    mesh=MeshConfig(data=1),
    data=DataConfig(source="", length=length),
    compute=ComputeConfig(dtype="bfloat16" if on_gpu else "float32"),
    optimizer=OptimizerConfig(
      learning_rate=rate, warmup=steps // 20, weight_decay=0.01, schedule="cosine"
    ),
  )


class AnswersTask(Task):
  """Predicts answers of a synthetic task; fresh rows at every step, fixed held-out rows."""

  unit: ClassVar[str] = "answers"

  def __init__(self, config: TrainConfig, draw: Draw):
    self.config, self.draw = config, draw
    self.model = Transformer(config.model, config.compute)
    self._predict = jax.jit(self._predicted)

  def init(self, key: jax.Array) -> Start:
    """Draws the parameters of the model."""
    return Start(self.model.init(key))

  def batches(self, rows: Any) -> Batches:
    """Returns an iterator over rows that no other step has seen."""

    def make(index: int) -> Batch:
      rng = np.random.default_rng((self.config.seed, _TRAINING, index))
      batch = self.draw(rng, self.config.batch)
      return batch._replace(**{name: getattr(batch, name)[rows] for name in Batch._fields[:3]})

    return IndexedBatches(make)

  def objective(
    self, params: Any, model_state: Any, batch: Batch, key: jax.Array
  ) -> dict[str, Weighted]:
    """Returns the cross-entropy of the answers."""
    states_BTD = self.model.apply(params, batch.inputs_BT, logits=False)
    head = self.model.head(params)
    return next_token_loss(states_BTD, head, batch.targets_BT, batch.weights_BT)

  def held_out(self, draw: Draw) -> list[Batch]:
    """Returns the rows that are evaluated, the same for all seeds."""
    indices = range(self.config.eval_batches)
    return [draw(np.random.default_rng((_HELD_OUT, i)), self.config.batch) for i in indices]

  def _predicted(self, params: Any, ids_BT: jax.Array) -> jax.Array:
    return jnp.argmax(self.model.apply(params, ids_BT), axis=-1)

  def evaluate(self, params: Any, model_state: Any, rows: Any) -> dict[str, float]:
    """Returns the share of held-out answers that are the likeliest id, and the cache's numbers."""
    right = total = 0.0
    for batch in self.held_out(self.draw):
      predicted_BT = np.asarray(self._predict(params, batch.inputs_BT))
      right += ((predicted_BT == batch.targets_BT) * batch.weights_BT).sum()
      total += batch.weights_BT.sum()
    state = cache_numbers(self.config.model, self.config.data.length)
    return {"accuracy": float(right / total), "state": state}

  def roles(self, params: Any) -> Any:
    """Returns each parameter's role, as the model declares it."""
    return roles(self.config.model)


def cache_numbers(model: ModelConfig, length: int) -> int:
  """Returns how many numbers a row keeps to decode after `length` positions, in all layers."""
  cache = jax.eval_shape(lambda: Transformer(model).init_cache(1, length))
  leaves = [x for x in jax.tree.leaves(cache) if jnp.issubdtype(x.dtype, jnp.floating)]
  return sum(math.prod(leaf.shape) for leaf in leaves)


def mixer(name: str, D: int, *, N: int = 1, sparse: Mapping[str, int] | None = None) -> MixerConfig:
  """Returns a mixer by the name that tables give it: N heads of width D / N.

  `sparse` holds the sizes of native sparse attention's blocks and window.
  """
  H = D // N
  if name == "attention":
    return AttentionConfig(N=N, K=N, H=H)
  if name == "nope":
    return AttentionConfig(N=N, K=N, H=H, rope=None)
  if name == "window":
    return AttentionConfig(N=N, K=N, H=H, window=(sparse or {})["window"])
  if name == "nsa":
    return NsaConfig(N=N, K=N, H=H, **(sparse or {}))  # type: ignore[arg-type]
  if name == "conv":
    return ConvConfig(taps=3)
  return KdaConfig(rule=name, N=N, K=N, H=H)  # type: ignore[arg-type]


def stacked(mixers: list[MixerConfig], D: int, V: int, *, F: int, repeats: int = 1) -> ModelConfig:
  """Returns a model of these mixers in order, so often, with the head tied to the embedding."""
  pattern = tuple(LayerSpec(mixer=m, feedforward=MlpConfig(F=F)) for m in mixers)
  return ModelConfig(D=D, V=V, layers=len(pattern) * repeats, pattern=pattern, tied=True)
