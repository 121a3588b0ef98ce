"""Between a run of this project and a folder in the Hub's layout."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np

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
from sharding import make_mesh

FIRST_POSITION = {"next_index": 0}  # of the training loader before its first batch


def convert(source: str | Path, target: str | Path, dtype: huggingface.DType | None = None) -> str:
  """Writes a run's newest weights as a checkpoint, or a checkpoint as a run at step 0; returns what it did.

  A checkpoint's weights have type `dtype`, by default the run's own float32; a run's are float32, so that `dtype` must
  be None or float32 there. tokenizer.json goes along. Raises ValueError as `huggingface.load` and `save` do.
  """
  if huggingface.is_checkpoint(source):
    if dtype not in (None, "float32"):
      raise ValueError(f"dtype={dtype!r}: the weights of a run are float32")
    return _to_run(huggingface.local_folder(source), Path(target))
  return _to_checkpoint(SavedRun.open(source), Path(target), dtype or "float32")


def _to_checkpoint(run: SavedRun, target: Path, dtype: huggingface.DType) -> str:
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
      raise OSError(f"{target}: the checkpoint could not be written")
  count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
  return f"{target}: a run of {count:,} parameters at step 0; go on with: jaxlm resume {target}"
