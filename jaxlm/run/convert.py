"""Converts between a run of this project and a folder in the Hub's layout."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxlm import presets
from jaxlm.checkpoint.checkpoint import Checkpoints
from jaxlm.config import TrainConfig, check
from jaxlm.config_json import to_dict
from jaxlm.data.corpus import absolute_paths
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.data.tokenizer import BPETokenizer
from jaxlm.interop import huggingface
from jaxlm.interop.hub_export import is_qwen2, with_own_tokenizer
from jaxlm.interop.hub_text import keep_text_files, make_text_files
from jaxlm.paths import local_path
from jaxlm.run.environment import differences
from jaxlm.run.lock import only_writer
from jaxlm.run.refusal import new_files_removed_if_failed
from jaxlm.run.remote import working_copy
from jaxlm.run.resolve import keep_published, load_initial_weights
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.saved_run import SavedRun
from jaxlm.run.text import TextTask
from jaxlm.train.state import init_state
from jaxlm.train.task import Start
from pallas_kernels.common.errors import UserError
from sharding import make_mesh

FIRST_POSITION = {"next_row": 0}  # of the training loader before its first batch


def convert(
  source: str | Path,
  target: str | Path,
  *,
  dtype: DTypeLike | None = None,
  config: TrainConfig | None = None,
) -> str:
  """Writes a run's newest weights as a checkpoint, or a checkpoint as a run at step 0.

  `source` is the folder of a run or of a checkpoint, or `hf:owner/name`. A written checkpoint has
  weights of type `dtype`, by default float32, in which runs keep theirs; those of a quantised model
  stay in bytes, as compressed-tensors packs them. A written run has
  `config`, by default `tuning_config`; `dtype` must be None or float32 there. The tokenizer and
  what belongs to it go along: a text starts and ends with the same tokens. Returns what was
  written, in words. Raises UserError as `huggingface.load` and `save` do.
  """
  weight_dtype = huggingface.resolve_dtype("float32" if dtype is None else dtype)
  if huggingface.is_checkpoint(source):
    check(weight_dtype == np.float32, "dtype", str(weight_dtype), "weights of a run are float32")
    config = config or tuning_config(source, target)
    ignored = huggingface.Ignored(config.ignore_config, config.ignore_tensors)
    return _write_run(config, tuning_config(source, target, ignored))
  folder = local_path(target, "target")
  huggingface.check_new(folder)
  with working_copy(source, "source") as run:
    return write_checkpoint(SavedRun.open(run), RunFolder(run).published, folder, weight_dtype)


def tuning_config(
  source: str | Path, target: str | Path, ignored: huggingface.Ignored = huggingface.NOTHING
) -> TrainConfig:
  """Returns the configuration of a run that goes on from the weights of the checkpoint `source`.

  It is `jaxlm.presets.tuning` with the checkpoint's model and tokenizer. Raises UserError where the
  checkpoint is incomplete or has no tokenizer.json.
  """
  folder = huggingface.local_folder(source)
  tokenizer = huggingface.find_tokenizer(folder)
  BPETokenizer.load(tokenizer)
  model, _, _ = huggingface.inspect(folder, "float32", ignored)
  config = presets.tuning(model)
  return dataclasses.replace(
    config,
    run=str(local_path(target, "target")),
    init=str(folder),
    ignore_config=ignored.config,
    ignore_tensors=ignored.tensors,
    data=dataclasses.replace(config.data, tokenizer=str(tokenizer)),
  )


def write_checkpoint(run: SavedRun, published: Path, target: Path, dtype: np.dtype) -> str:
  """Writes weights and tokenizer; `published` has the text files that the run started from."""
  model = run.config.model
  if model.max_length is None:
    model = dataclasses.replace(model, max_length=run.config.data.length)
  params = jax.tree_util.tree_map_with_path(
    lambda path, w: w if path[-1].key.startswith("packed_") else w.astype(dtype), run.params
  )
  if (published / TOKENIZER_FILE).is_file():
    text_files = keep_text_files(published, run.tokenizer.eos, model.V)
  else:
    text_files = make_text_files(run.tokenizer, model.V, model.max_length or 0)
    plain, params = with_own_tokenizer(dataclasses.replace(model, quant=()), params)
    model = dataclasses.replace(plain, quant=model.quant)
  with new_files_removed_if_failed(target):
    huggingface.save(target, model, params, text_files=text_files)
  names = ", ".join(["config.json", *text_files.files])
  line = f"{target}: weights of step {run.step} in {dtype}, {names}"
  if not (published / TOKENIZER_FILE).is_file() and is_qwen2(dataclasses.replace(model, quant=())):
    line += "\nAutoTokenizer of transformers 5 gives other ids than this tokenizer.json in Qwen2's "
    line += f"layout; PreTrainedTokenizerFast.from_pretrained({str(target)!r}) reads it as it is"
  return line


def _write_run(config: TrainConfig, given: TrainConfig) -> str:
  """Writes a run of `config` at step 0; what the checkpoint fixes must be as in `given`."""
  if wrong := differences(_fixed_fields(given), _fixed_fields(config)):
    rule = "these flags contradict the checkpoint (checkpoint -> flag)"
    raise UserError(f"{given.init}: {rule}: {'; '.join(wrong)}")
  config = dataclasses.replace(config, data=absolute_paths(config.data))
  run = RunFolder.at(config.run, "target")
  run.check_new()
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh), only_writer(run.path), new_files_removed_if_failed(run.path):
    params = load_initial_weights(config)
    initialize = lambda start: init_state(config, TextTask(config), start)  # noqa: E731
    state = jax.jit(initialize, donate_argnums=0)(Start(params))
    run.create(config)
    shutil.copy(config.data.tokenizer, run.path / TOKENIZER_FILE)
    keep_published(config, run)
    with Checkpoints(run.checkpoints, keep=config.keep) as checkpoints:
      checkpoints.save(state, FIRST_POSITION)
    if checkpoints.saved != 0:
      raise OSError(errno.EIO, "the checkpoint could not be written", str(run.path))
  count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  return f"{run.path}: a run of {count:,} parameters at step 0; go on with: jaxlm resume {run.path}"


def _fixed_fields(config: TrainConfig) -> dict[str, Any]:
  """Returns what a checkpoint fixes of the run that is made of it, as plain nested dicts."""
  values = to_dict(config)
  return {
    "model": values["model"],
    "init": config.init,
    "run": config.run,
    "data": {"tokenizer": config.data.tokenizer},
  }
