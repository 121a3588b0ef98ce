"""Runs a step of a run again, to find where its numbers go wrong (`jaxlm replay`).

Starts from the newest checkpoint before the step. Runs repeat bit for bit, so the steps between are
run again, without writing anything, and compared with what was recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.checkpoint.folder import checkpoint_path, hold_newest_sound
from jaxlm.config import MeshConfig, TrainConfig, check
from jaxlm.data.loader import Batch, load_text
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.models.transformer import Block, Transformer
from jaxlm.objectives import Weighted
from jaxlm.run.guard import Guard, load_batch
from jaxlm.run.remote import working_copy
from jaxlm.run.resolve import check_mesh
from jaxlm.run.restore import restore_or_init
from jaxlm.run.run_folder import RunFolder, log_to, read_records
from jaxlm.run.text import TextTask
from jaxlm.run.text_identity import changed_text
from jaxlm.train.accumulate import accumulated_gradients
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_train_step
from sharding import make_mesh
from sharding.batches import globalize


def replay(run: str | Path, step: int, print_status: Callable[[str], Any] = print) -> None:
  """Prints the numbers of a step (1-based) and the first module whose output is not finite.

  Uses the batch that a stopped run saved, or else the one that the order of the data gives. Needs
  one process with the run's own mesh. Raises UserError for a step that the run does not have.
  """
  with working_copy(run) as path:
    _replay(RunFolder(path), step, print_status)


def _replay(folder: RunFolder, step: int, print_status: Callable[[str], Any]) -> None:
  config = folder.read_config()
  check(1 <= step <= config.steps, "step", step, f"the run has steps 1 to {config.steps}")
  check_mesh(config)
  with log_to(None), jax.set_mesh(make_mesh(config.mesh)):
    state, batch = _restore_before(config, folder, step, print_status)
    params = jax.device_get(state.params)
    norm = float(jax.jit(optax.tree.norm)(state.params))
    print_status(f"norm of the weights before step {step}: {norm:.6g}")
    train_step = jax.jit(make_train_step(config, TextTask(config)))
    values = jax.device_get(train_step(state, globalize(batch, config.batch))[1])
    print_status(f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}")
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    for line in diagnose(config, jax.tree.map(jnp.asarray, params), batch):
      print_status(line)


def _restore_before(
  config: TrainConfig, folder: RunFolder, step: int, print_status: Callable[[str], Any]
) -> tuple[TrainState, Batch]:
  """Returns the state before a step and the step's batch."""
  text = load_text(config.data, load_tokenizer(folder.path, config.data, config.model.V))
  for change in changed_text(folder, text.digests):
    print_status(f"not the text of the run: {change}")
  task = TextTask(config, text)
  with contextlib.ExitStack() as stack:
    try:
      start = stack.enter_context(hold_newest_sound(folder.checkpoints, before=step))
    except FileNotFoundError:
      start, checkpoint, origin = 0, None, "the initial weights"
    else:
      checkpoint = checkpoint_path(folder.checkpoints, start)
      origin = f"the checkpoint of step {start}"
    print_status(f"replaying from {origin}")
    state, batches = restore_or_init(config, task, checkpoint)
  train_step = jax.jit(make_train_step(config, task), donate_argnums=0)
  guard = Guard(config, folder, start)
  recorded = {record["step"]: record["loss"] for record in read_records(folder.metrics)}
  different = []
  for at in range(start + 1, step):
    state, metrics = train_step(state, globalize(next(batches), config.batch), guard.limit(at))
    loss = float(metrics["loss"])
    guard.losses[at] = loss
    if at in recorded and not _same(recorded[at], loss):
      different.append(at)
  if step > start + 1:
    outcome = "repeat the record bit for bit"
    if different:
      outcome = f"differ from the record from step {different[0]} on"
    print_status(f"steps {start + 1} to {step - 1} {outcome}")
  expected, arrays = next(batches), load_batch(folder.bad_steps, step)
  saved = None if arrays is None else Batch(**arrays)
  if saved is not None and not all(
    map(np.array_equal, jax.tree.leaves(saved), jax.tree.leaves(expected))
  ):
    print_status("the saved batch is not the one that the data gives now; the saved one is used")
  return state, expected if saved is None else saved


def _same(a: float, b: float) -> bool:
  return a == b or (a != a and b != b)


def diagnose(config: TrainConfig, params: Any, batch: Batch) -> list[str]:
  """Returns lines that say which numbers of a step are the first that are not finite.

  Looks at weights, outputs of modules, loss and gradients, in this order, on one device.
  """
  lines = [_describe_leaves(params, "weights", "the weights are finite")]
  compute = dataclasses.replace(config.compute, scan="never", remat="none")
  eager = dataclasses.replace(config, compute=compute)
  for part in range(config.accumulate):
    rows = jax.tree.map(lambda x, part=part: jnp.asarray(x[part :: config.accumulate]), batch)
    first, loss = first_not_finite(eager, params, rows)
    where = f" (micro-batch {part})" if config.accumulate > 1 else ""
    if first:
      return [*lines, f"the first module whose output is not finite is {first}{where}"]
    if not _finite(loss):
      return [*lines, f"every module's output is finite, the loss is {loss}{where}"]
  lines.append("every module's output and the loss are finite")

  def objective(params: Any, batch: Batch, key: jax.Array) -> dict[str, Weighted]:
    return TextTask(config).objective(params, {}, batch, key)

  gradients = jax.jit(accumulated_gradients, static_argnums=(0, 4))
  key = jax.random.key(0)  # text's objective draws nothing
  grads, _ = gradients(objective, params, jax.tree.map(jnp.asarray, batch), key, config.accumulate)
  return [*lines, _describe_leaves(grads, "gradients", "every gradient is finite")]


def _describe_leaves(tree: Any, kind: str, all_finite: str) -> str:
  """Returns a line that names the leaves that are not finite, or `all_finite`."""
  named = jax.tree_util.tree_leaves_with_path(tree)
  bad_names = [_name(path) for path, leaf in named if not _finite(leaf)]
  return f"{kind} that are not finite: {', '.join(bad_names)}" if bad_names else all_finite


def first_not_finite(config: TrainConfig, params: Any, batch: Batch) -> tuple[str, float]:
  """Returns the innermost module whose output is the first that is not finite, and the loss.

  The module is "" if all are finite. Runs without jit, to the logits, which the loss does without.
  """
  bad_modules: list[str] = []
  layers = 0  # begun so far

  def watch(run: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    nonlocal layers
    if context.method_name != "__call__":
      return run(*args, **kwargs)
    layers += isinstance(context.module, Block)
    result = run(*args, **kwargs)
    if not all(map(_finite, jax.tree.leaves(result))):
      bad_modules.append(_describe(context.module, layers))
    return result

  with nn.intercept_methods(watch):
    Transformer(config.model, config.compute).apply(
      params,
      batch.inputs_BT,
      positions=batch.positions_BT,
      segment_ids=batch.segment_ids_BT,
      in_order=True,
    )
  loss = TextTask(config).objective(params, {}, batch, jax.random.key(0))["loss"].mean()
  return (bad_modules[0] if bad_modules else ""), float(loss)


def _describe(module: nn.Module, layers: int) -> str:
  """Returns the name of a module that ran when `layers` layers had begun."""
  if module.path:
    return f"block {layers - 1}: {'.'.join(module.path)}"
  if isinstance(module, Block):
    return f"block {layers - 1}: its sum"
  return {"Embedding": "the embedding", "RMSNorm": "norm"}.get(type(module).__name__, "the head")


def _finite(x: Any) -> bool:
  return bool(jnp.isfinite(x).all())


def _name(path: tuple) -> str:
  return "/".join(str(key.key) for key in path)
