"""Opens a run or a Hugging Face checkpoint for use: configuration, weights and tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.checkpoint import restore_weights
from jaxlm.checkpoint.folder import checkpoint_path, hold_newest_sound
from jaxlm.config import ComputeConfig, DataConfig, MeshConfig, TrainConfig, check, check_seed
from jaxlm.data.loader import TextData, load_text
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.data.tokenizer import BPETokenizer, Tokenizer, check_vocabulary, load_tokenizer
from jaxlm.decode import NoDistribution, Sampler, generate
from jaxlm.interop import huggingface
from jaxlm.interop.hub_text import read_end_ids
from jaxlm.run import packed
from jaxlm.run.remote import working_copy
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.text import TextTask
from jaxlm.train.state import init_state
from pallas_kernels.common.platform import platform
from sharding import make_mesh
from sharding.batches import local_rows

_NEEDS = {"splash": "tpu", "cudnn": "gpu", "pallas_tpu": "tpu", "pallas_gpu": "gpu"}


@dataclasses.dataclass(frozen=True)
class SavedRun:
  """Holds the newest sound checkpoint of a run, or published weights, on one device.

  A run that names a kernel of another platform than this one runs the one that is chosen here.
  """

  config: TrainConfig
  tokenizer: Tokenizer
  params: Any
  step: int
  start_ids: tuple[int, ...]
  """what a text begins with: the end of document, or in a published folder and in runs that start
  from one what its tokenizer puts there"""
  end_ids: tuple[int, ...]
  """ids that end a text: the end of document, or what a published folder names"""

  @classmethod
  def open(
    cls,
    run: str | Path,
    *,
    dtype: str | None = None,
    ignored: huggingface.Ignored = huggingface.NOTHING,
  ) -> SavedRun:
    """Opens a run, a quantised model, or a checkpoint folder or `hf:owner/name` with its tokenizer.

    The weights of a checkpoint get `dtype`, by default that of its files, and `ignored` names what
    is not read of it. Raises UserError for a folder that does not exist or is neither,
    FileNotFoundError for a run without a sound checkpoint.
    """
    if huggingface.is_checkpoint(run):
      return cls._open_published(huggingface.local_folder(run), dtype, ignored)
    rule = "is for Hugging Face checkpoints; this is a run"
    check(dtype is None, "dtype", dtype, rule)
    check(ignored == huggingface.NOTHING, "ignored", tuple(ignored), rule)
    with working_copy(run) as path:
      return cls(*packed.load(path)) if packed.is_packed(path) else cls._open_run(RunFolder(path))

  @classmethod
  def _open_run(cls, folder: RunFolder) -> SavedRun:
    config = for_this_platform(dataclasses.replace(folder.read_config(), mesh=MeshConfig(data=1)))
    mesh = make_mesh(config.mesh)
    with hold_newest_sound(folder.checkpoints) as newest, jax.set_mesh(mesh):
      like = jax.eval_shape(lambda: init_state(config, TextTask(config)))
      params = restore_weights(checkpoint_path(folder.checkpoints, newest), like)
    tokenizer = load_tokenizer(folder.path, config.data, config.model.V)
    start_ids: tuple[int, ...] = (tokenizer.eos,)  # what stands before every document of the text
    end_ids = [tokenizer.eos]
    if (folder.published / TOKENIZER_FILE).is_file() and isinstance(tokenizer, BPETokenizer):
      start_ids = tokenizer.start_ids()
      end_ids = [*read_end_ids(folder.published, config.model.V), tokenizer.eos]
    return cls(config, tokenizer, params, newest, start_ids, tuple(dict.fromkeys(end_ids)))

  @classmethod
  def _open_published(
    cls, folder: Path, dtype: str | None, ignored: huggingface.Ignored
  ) -> SavedRun:
    tokenizer = BPETokenizer.load(huggingface.find_tokenizer(folder))
    model, params = huggingface.load(folder, dtype, ignored)
    check_vocabulary(tokenizer, model.V, folder / TOKENIZER_FILE)
    config = TrainConfig(
      model=model,
      compute=ComputeConfig(dtype=_compute_type(params)),
      data=DataConfig(source="", tokenizer=str(folder / TOKENIZER_FILE)),
      mesh=MeshConfig(data=1),
    )
    end_ids = read_end_ids(folder, model.V) or (tokenizer.eos,)
    return cls(config, tokenizer, params, 0, tokenizer.start_ids(), end_ids)

  def sample(self, prompt: str, *, sampler: Sampler, max_new: int, seed: int = 0) -> str:
    """Returns the text that continues the prompt, up to `max_new` tokens or the document's end.

    Only ids that have a text are drawn. Raises NoDistribution, naming a weight that is not finite
    if there is one, where the logits are NaN.
    """
    check_seed(seed)
    ends = list(self.end_ids)
    prompt_ids = self.tokenizer.encode(prompt).tolist()
    context_ids = [*self.start_ids, *prompt_ids] or [self.tokenizer.eos]
    drawable_V = np.isin(np.arange(self.config.model.V), [*self.tokenizer.list_ids(), *ends])
    try:
      ids_M = generate(
        self.config.model,
        self.params,
        [context_ids],
        compute=self.config.compute,
        sampler=sampler,
        max_new=max_new,
        key=jax.random.key(seed),
        eos=ends,
        drawable_V=drawable_V,
      )[0]
    except NoDistribution as error:
      raise NoDistribution(f"{error}; {self.describe_weights()}") from error
    stops = np.isin(ids_M, ends).nonzero()[0]
    new_ids = ids_M[: stops[0]].tolist() if len(stops) else ids_M.tolist()
    # Behind its prompt, because a decoder may drop the space before the first word of a text.
    before, text = self.tokenizer.decode(prompt_ids), self.tokenizer.decode(prompt_ids + new_ids)
    return text[len(before) :] if text.startswith(before) else self.tokenizer.decode(new_ids)

  def describe_weights(self) -> str:
    """Returns a clause that names the first weight with NaN or infinity, or says there is none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
      bad = int((~jnp.isfinite(leaf)).sum())
      if bad:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return f"the weights {name} hold {bad:,} values that are NaN or infinite"
    return f"all weights are finite: an activation overflows in {self.config.compute.dtype}"

  def evaluate(
    self, limit: int | None = None, data: DataConfig | None = None
  ) -> tuple[TextData, dict[str, float]]:
    """Returns (the text, evaluation as in eval.jsonl) over all held-out text or `limit` batches.

    The text is that of `data`, by default the run's own. Raises UserError for published weights,
    which have none, without `data`.
    """
    data = dataclasses.replace(data or self.config.data, tokenizer=self.config.data.tokenizer)
    rule = "a checkpoint has no text of its own; name one to measure on"
    check(bool(data.source), "data.source", data.source, rule)
    text = load_text(data, self.tokenizer)
    config = dataclasses.replace(self.config, data=data)
    with jax.set_mesh(make_mesh(config.mesh)):
      rows = local_rows(config.batch)
      values = TextTask(config, text).evaluate(self.params, {}, rows, limit)
    return text, values


def for_this_platform(config: TrainConfig) -> TrainConfig:
  """Returns the configuration without the kernels it names that run on other platforms only.

  These are chosen anew ("auto"), and the log says so. Only for use of a run: training runs the
  implementation that its configuration names, or raises.
  """
  here, compute = platform(), config.compute
  if _NEEDS.get(compute.attention_implementation, here) != here:
    _log_change("compute.attention_implementation", compute.attention_implementation, here)
    compute = dataclasses.replace(compute, attention_implementation="auto")
    config = dataclasses.replace(config, compute=compute)
  if _NEEDS.get(config.loss_implementation, here) != here:
    _log_change("loss_implementation", config.loss_implementation, here)
    config = dataclasses.replace(config, loss_implementation="auto")
  return config


def _log_change(field: str, name: str, here: str) -> None:
  message = "%s=%s of the run needs a %s; on %s it is chosen anew"
  logging.getLogger(__name__).info(message, field, name, _NEEDS[name], here)


def _compute_type(params: Any) -> Literal["bfloat16", "float32"]:
  """Returns bfloat16 for weights of that type, else float32."""
  kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
  return "bfloat16" if kinds == {"bfloat16"} else "float32"
