"""Converts between a run of this project and a folder in the Hub's layout."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxlm.checkpoint.checkpoint import Checkpoints
from jaxlm.config import DataConfig, TrainConfig
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.data.tokenizer import BPETokenizer
from jaxlm.interop import huggingface
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.saved_run import SavedRun
from jaxlm.run.text import TextTask
from jaxlm.train.state import init_state
from jaxlm.train.task import Start
from pallas_kernels.common.errors import UserError
from sharding import make_mesh

FIRST_POSITION = {"next_index": 0}  # of the training loader before its first batch


def convert(source: str | Path, target: str | Path, dtype: DTypeLike | None = None) -> str:
  """Writes a run's newest weights as a checkpoint, or a checkpoint as a run at step 0.

  `source` is the folder of a run or of a checkpoint, or `hf:owner/name`. A written checkpoint has
  weights of type `dtype`, by default float32, in which runs keep theirs; for a run, `dtype` must
  be None or float32. tokenizer.json is copied. Returns a line that says what was written. Raises
  UserError as `huggingface.load` and `save` do.
  """
  weight_dtype = huggingface.resolve_dtype("float32" if dtype is None else dtype)
  if huggingface.is_checkpoint(source):
    if weight_dtype != np.float32:
      raise UserError(f"dtype={weight_dtype}: the weights of a run are float32")
    return _to_run(huggingface.local_folder(source), Path(target))
  return _to_checkpoint(SavedRun.open(source), Path(target), weight_dtype)


def _to_checkpoint(run: SavedRun, target: Path, dtype: np.dtype) -> str:
  model = run.config.model
  if model.max_length is None:
    model = dataclasses.replace(model, max_length=run.config.data.length)
  params = jax.tree.map(lambda w: w.astype(dtype), run.params)
  huggingface.save(target, model, params)
  if isinstance(run.tokenizer, BPETokenizer):
    run.tokenizer.save(target)
    tokens = TOKENIZER_FILE
  else:
    tokens = "no tokenizer.json: its tokens are bytes"
  return f"{target}: weights of step {run.step} in {dtype}, config.json, {tokens}"


def _to_run(folder: Path, target: Path) -> str:
  tokenizer = folder / TOKENIZER_FILE
  BPETokenizer.load(tokenizer)
  model, _, _ = huggingface.inspect(folder, "float32")
  config = TrainConfig(
    run=str(target), init=str(folder), model=model, data=DataConfig(tokenizer=str(tokenizer))
  )
  run = RunFolder(target)
  with jax.set_mesh(make_mesh(config.mesh)):
    params = huggingface.load(folder, dtype="float32")[1]
    run.create(config)
    shutil.copy(tokenizer, target / TOKENIZER_FILE)
    initialize = lambda start: init_state(config, TextTask(config), start)  # noqa: E731
    state = jax.jit(initialize, donate_argnums=0)(Start(params))
    checkpoints = Checkpoints(run.checkpoints, keep=config.keep)
    checkpoints.save(state, FIRST_POSITION)
    if checkpoints.close() != 0:
      raise OSError(errno.EIO, "the checkpoint could not be written", str(target))
  count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
  return f"{target}: a run of {count:,} parameters at step 0; go on with: jaxlm resume {target}"
