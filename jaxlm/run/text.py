"""Makes text a task, and puts `train` and `resume` on top of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from jaxlm.config import OnNewSteps, TrainConfig
from jaxlm.data.baselines import baselines
from jaxlm.data.corpus import absolute_paths
from jaxlm.data.loader import Batch, TextData, heldout_batches, load_text, train_loader
from jaxlm.data.ring import in_ring_order
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.models import Head, Transformer, roles
from jaxlm.objectives import Weighted, nested_loss, next_token_loss
from jaxlm.quant.describe import describe
from jaxlm.quant.first_step import check_probes, probe
from jaxlm.quant.mix_and_match import slice_model
from jaxlm.quant.scales import learned_scales, start_scales
from jaxlm.run.lock import only_writer
from jaxlm.run.loop import TrainResult
from jaxlm.run.metrics import print_status
from jaxlm.run.output import forgiving_output
from jaxlm.run.remote import working_copy
from jaxlm.run.resolve import (
  check_mesh,
  keep_published,
  load_initial_weights,
  with_initial_model,
  with_vocabulary,
)
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.start import check_run, continue_run, find_newest, start_run
from jaxlm.run.text_identity import check_same_everywhere, check_text, record_text
from jaxlm.run.text_stages import stages_of_text
from jaxlm.run.trackers import check_login
from jaxlm.scaling.flops import train_flops_of_rows
from jaxlm.train.evaluate import make_evaluator
from jaxlm.train.schedule import with_new_steps
from jaxlm.train.stages import Stages
from jaxlm.train.task import Batches, Start, Task
from pallas_kernels.common.errors import UnsupportedError
from sharding.batches import globalize
from sharding.context.order import Order
from sharding.multihost import run_on_main_process


@forgiving_output()
def train(config: TrainConfig) -> TrainResult:
  """Trains a language model from scratch or from `config.init` into the new folder `config.run`.

  Raises UserError for what cannot work, before it starts and without leaving anything behind.
  """
  with working_copy(config.run, write=True, new=True) as path:
    return _train(dataclasses.replace(config, run=str(path)))


def _train(config: TrainConfig) -> TrainResult:
  check_run(config)
  folder = RunFolder(Path(config.run))
  run_on_main_process(folder.check_new)
  run_on_main_process(lambda: check_login(config))
  config = with_initial_model(config)
  check_mesh(config)
  text = load_text(config.data, report=print_status)
  check_same_everywhere(text)
  tokenizer = text.tokenizer
  size = tokenizer.needed_size if config.init else tokenizer.vocab_size
  config = with_vocabulary(config, size)
  config = dataclasses.replace(config, data=absolute_paths(config.data))
  check_mesh(config)  # again, because the text's vocabulary may have become the model's
  with only_writer(folder.path):
    return start_run(config, TextTask(config, text), folder)


@forgiving_output()
def resume(
  run: str | Path,
  config: TrainConfig | None = None,
  *,
  steps: int | None = None,
  schedule: OnNewSteps | None = None,
  other_text: bool = False,
) -> TrainResult:
  """Goes on with a run of `train` from its newest checkpoint that verifies, as `fit` does.

  `config` replaces the run's configuration, `steps` only its number of steps. `schedule` chooses
  what the learning rate does then; by default its schedule spans `steps`, unless an earlier resume
  has chosen. A changed batch goes on with the next row of the text. Raises UserError
  where `config` contradicts the checkpoint, and, unless `other_text`, where the text is not the one
  that the run was trained on.
  """
  with working_copy(run, write=True) as path:
    return _resume(RunFolder(path), config, steps, schedule, other_text)


def _resume(
  folder: RunFolder,
  config: TrainConfig | None,
  steps: int | None,
  schedule: OnNewSteps | None,
  other_text: bool,
) -> TrainResult:
  before = folder.read_config()
  config = dataclasses.replace(config or before, run=str(folder.path))
  if steps is not None:
    config = dataclasses.replace(config, steps=steps)
  check_run(config)
  check_mesh(config)
  with only_writer(folder.path):
    newest = find_newest(config, folder, other_data=other_text, counts_rows=True)
    if schedule is not None:
      config = with_new_steps(config, before.steps, max(newest, 0), schedule)
    begun = newest >= 0
    tokenizer = load_tokenizer(folder.path, config.data, config.model.V) if begun else None
    text = load_text(config.data, tokenizer, print_status)
    check_same_everywhere(text)
    allowed = other_text or newest <= 0  # nothing has been trained on it
    run_on_main_process(lambda: check_text(folder, text, other_text=allowed))
    config = dataclasses.replace(config, data=absolute_paths(config.data))
    task = TextTask(config, text)
    return continue_run(config, task, folder, newest, before, lambda: record_text(folder, text))


class TextTask(Task):
  """Predicts the next token of text. Without `text` it serves for shapes and steps alone."""

  unit: ClassVar[str] = "tokens"

  def __init__(self, config: TrainConfig, text: TextData | None = None):
    self.config, self._text = config, text
    self.model = Transformer(config.model, config.compute)
    self.slices = {
      bits: Transformer(slice_model(config.model, bits), config.compute)
      for bits in config.nested.bits
    }
    self._evaluate = make_evaluator(self.losses)

  @property
  def text(self) -> TextData:
    """Returns the text; the task must have been made with one."""
    assert self._text is not None, "this task was made without text"
    return self._text

  def init(self, key: jax.Array) -> Start:
    """Draws the parameters of the model, all of which are trained."""
    return Start(self.model.init(key))

  def pretrained(self) -> Start | None:
    """Loads the weights of the checkpoint `config.init` in float32, if it is set."""
    if not self.config.init:
      return None
    return Start(load_initial_weights(self.config))

  def batches(self, rows: Any) -> Batches:
    """Returns an iterator over packed or windowed rows of the training text."""
    return train_loader(self.text, batch=self.config.batch, seed=self.config.seed, rows=rows)

  def batch_types(self) -> Batch:
    """Returns the shapes and dtypes of a global batch, to lower a step from."""
    shape = (self.config.batch, self.config.data.length)
    whole, real = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.float32))
    packed = whole if self.config.data.layout == "packed" else None
    return Batch(whole, whole, real, packed, packed)

  def objective(
    self, params: Any, model_state: Any, batch: Batch, key: jax.Array
  ) -> dict[str, Weighted]:
    """Returns the terms of next-token prediction, without all logits in memory.

    Of several nested widths it is their weighted sum; logits are held where one teaches another.
    """
    batch, order = in_ring_order(batch)
    if not self.slices:
      return self._loss(*self._run(self.model, params, batch, order, key), batch)
    return nested_loss(
      self.config.nested,
      lambda bits: self._run(self.slices[bits], params, batch, order, key),
      lambda states_BTD, head: self._loss(states_BTD, head, batch),
      batch.weights_BT,
    )

  def losses(
    self, params: Any, model_state: Any, batch: Batch, key: jax.Array
  ) -> dict[str, Weighted]:
    """Returns the loss of the model under its rules, and of each nested width by its name."""
    batch, order = in_ring_order(batch)
    models = {"loss": self.model} | {f"loss_int{r}": model for r, model in self.slices.items()}
    return {
      name: self._loss(*self._run(model, params, batch, order, key), batch)["loss"]
      for name, model in models.items()
    }

  def _run(
    self, model: Transformer, params: Any, batch: Batch, order: Order, key: jax.Array
  ) -> tuple[jax.Array, Head]:
    """Returns the last states [B, T, D] and the head that makes logits of them."""
    states_BTD = model.apply(
      params,
      batch.inputs_BT,
      positions=batch.positions_BT,
      segment_ids=batch.segment_ids_BT,
      in_order=True,
      order=order,
      key=key if self.config.model.quant else None,
      logits=False,
    )
    return states_BTD, model.head(params)

  def _loss(self, states_BTD: jax.Array, head: Head, batch: Batch) -> dict[str, Weighted]:
    return next_token_loss(
      states_BTD,
      head,
      batch.targets_BT,
      batch.weights_BT,
      self.config.z_loss,
      self.config.loss_implementation,
    )

  def stages(self) -> Stages:
    """Returns how the model runs in pipeline stages; raises where it runs in several widths."""
    if self.slices:
      rule = "several widths of one model do not run in pipeline stages: mesh.stage must be 1"
      raise UnsupportedError(f"nested.bits={self.config.nested.bits}: {rule}")

    def loss(params: Any, states_BTD: jax.Array, batch: Batch) -> dict[str, Weighted]:
      return self._loss(states_BTD, self.model.head(params), batch)

    return stages_of_text(self.model, loss)

  def evaluate(
    self, params: Any, model_state: Any, rows: Any, limit: int | None = -1
  ) -> dict[str, float]:
    """Returns loss (nats per token), bits per byte and tokens of held-out text.

    `limit` is the number of batches, by default the configuration's; None reads all. Of a nested
    width r there is "heldout_loss_intR".
    """

    def batches() -> Iterator[Batch]:
      most = self.config.eval_batches if limit == -1 else limit
      for batch in heldout_batches(self.text, batch=self.config.batch, rows=rows, limit=most):
        yield globalize(batch, self.config.batch)

    totals = self._evaluate(params, model_state, batches())
    total = totals["loss"]
    loss = float(total.mean())
    return {
      **{f"heldout_{name}": float(term.mean()) for name, term in totals.items()},
      "bits_per_byte": self.text.bits_per_byte(loss),
      "tokens": int(total.den),
    }

  def roles(self, params: Any) -> Any:
    """Returns each parameter's role, as the model declares it."""
    return roles(self.config.model)

  @property
  def calibrates(self) -> bool:  # type: ignore[override]
    """Returns whether the rules learn scales."""
    return bool(learned_scales(self.config.model))

  def calibrate(self, params: Any, batch: Batch) -> Any:
    """Returns the parameters with learned scales that fit the inputs of the first batch."""
    ids_BT = batch.inputs_BT
    return start_scales(self.config.model, params, ids_BT, self.config.compute)

  def probe(self, params: Any, grads: Any) -> dict[str, jax.Array]:
    """Returns which quantised matmuls have a scale of zero, or no gradient."""
    return probe(self.config.model, params, grads)

  def check_first_step(self, metrics: Mapping[str, Any]) -> None:
    """Raises UserError, naming the matmuls, for what `probe` found."""
    check_probes(self.config.model, metrics)

  def matmuls(self) -> list[str]:
    """Returns the table of matmuls and their formats, where there are rules."""
    model = self.config.model
    lines = describe(model, self.config.compute.dtype) if model.quant else []
    return lines + ([f"trained together: {self.config.nested}"] if self.slices else [])

  def flops(self, batch: Batch) -> float:
    """Returns the matmul FLOPs of forward and backward on these rows, of every nested width."""
    positions_BT = batch.positions_BT
    if positions_BT is None:
      positions_BT = np.broadcast_to(np.arange(batch.weights_BT.shape[1]), batch.weights_BT.shape)
    flops = train_flops_of_rows(self.config.model, positions_BT, batch.weights_BT > 0)
    return flops * self.config.nested.passes

  def save(self, folder: Path) -> None:
    """Writes the tokenizer, what the initial checkpoint says of it, and the digests of the text."""
    self.text.tokenizer.save(folder)
    keep_published(self.config, RunFolder(folder))
    record_text(RunFolder(folder), self.text)

  def references(self) -> dict[str, float]:
    """Returns what simple codes of the held-out text cost, in bits per byte."""
    return baselines(self.text.store)

  def report(self) -> list[str]:
    """Returns where the text is from, how it is split, and what was left out of it."""
    return self.text.store.report.splitlines()

  def describe(self) -> str:
    """Returns the line of the log that says how much text there is."""
    return self.text.report.splitlines()[-1]
