"""Fills in and checks what a configuration leaves to the checkpoint, the text and the devices."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import AttentionConfig, ConvConfig, MixerConfig, TrainConfig, check
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.interop import huggingface
from jaxlm.interop.hub_text import read_published
from jaxlm.models.parts import list_matmuls
from jaxlm.quant.scales import start_scales
from jaxlm.run.run_folder import RunFolder
from jaxlm.train.stages import cut_layers, make_schedule
from pallas_kernels.common.errors import UserError


def with_vocabulary(config: TrainConfig, vocab_size: int) -> TrainConfig:
  """Returns `config` with a vocabulary of at least `vocab_size` ids.

  Raises UserError where the weights that training starts from have fewer.
  """
  if config.model.V >= vocab_size:
    return config
  rule = f"has {vocab_size} ids, more than the V={config.model.V} of init={config.init!r}"
  check(not config.init, "data.tokenizer", config.data.tokenizer, rule)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, V=vocab_size))


def with_initial_model(config: TrainConfig) -> TrainConfig:
  """Returns `config` with the model of the checkpoint that training starts from, if there is one.

  The checkpoint's tokenizer takes the place of `bytes`. Raises UserError like `huggingface.load`,
  and where there is no tokenizer.json in the checkpoint and `data.tokenizer` names none.
  """
  if not config.init:
    return config
  folder = huggingface.local_folder(config.init)
  model, _, _ = huggingface.inspect(folder, "float32", _ignored(config))
  data = config.data
  if data.tokenizer == "bytes":
    try:
      data = dataclasses.replace(data, tokenizer=str(huggingface.find_tokenizer(folder)))
    except UserError as error:
      raise UserError(f"{error}; or name one by --data.tokenizer FILE") from None
  model = dataclasses.replace(model, quant=config.model.quant)
  return dataclasses.replace(config, model=model, data=data)


def load_initial_weights(config: TrainConfig) -> Any:
  """Returns the weights of the checkpoint `config.init` in float32, on the current mesh.

  Scales that `model.quant` learns join them, at their first values.
  """
  params = huggingface.load(config.init, "float32", _ignored(config))[1]
  return start_scales(config.model, params)


def keep_published(config: TrainConfig, run: RunFolder) -> None:
  """Copies what the checkpoint `config.init` says of its text into the run, for an export.

  Copies nothing where the run has another tokenizer than the checkpoint.
  """
  if not config.init:
    return
  folder = huggingface.local_folder(config.init)
  if Path(config.data.tokenizer).resolve() != (folder / TOKENIZER_FILE).resolve():
    return
  run.published.mkdir(exist_ok=True)
  for name, content in read_published(folder).items():
    (run.published / name).write_bytes(content)


def _ignored(config: TrainConfig) -> huggingface.Ignored:
  return huggingface.Ignored(config.ignore_config, config.ignore_tensors)


def check_mesh(config: TrainConfig, devices: int | None = None) -> None:
  """Raises UserError where the model does not divide over the mesh or cannot use an axis of it.

  Likewise for a rule of `model.quant` that decides no matmul. The mesh is one of `devices`, by
  default of those that are here.
  """
  list_matmuls(config.model)
  sizes = config.mesh.resolve(jax.device_count() if devices is None else devices)
  rule = "the model does not use this axis; it must be 1"
  check(sizes["expert"] == 1, "mesh.expert", sizes["expert"], rule)
  _check_stages(config, sizes)
  model, length = config.model, config.data.length
  ring, ulysses = sizes["context_ring"], sizes["context_ulysses"]
  _check_divides("model.D", model.D, sizes, "fsdp", "context_ring", "context_ulysses")
  _check_divides("model.V", model.V, sizes, "tensor")
  _check_divides("data.length", length, sizes, "context_ring", "context_ulysses", "tensor")
  if ring > 1:
    rule = "must be a multiple of 2 x mesh.context_ring x mesh.context_ulysses="
    rule += f"{2 * ring * ulysses}, so that the ring's ranks do equal work"
    check(length % (2 * ring * ulysses) == 0, "data.length", length, rule)
  for group in ("prefix", "pattern", "remainder"):
    for position, spec in enumerate(getattr(model, group)):
      path = f"model.{group}.{position}"
      _check_mixer(f"{path}.mixer", spec.mixer, model.D, sizes)
      _check_divides(f"{path}.feedforward.F", spec.feedforward.F, sizes, "tensor")


def _check_mixer(path: str, mixer: MixerConfig, D: int, sizes: dict[str, int]) -> None:
  """Raises UserError where a mixer's heads do not divide, or the mesh splits rows and it cannot."""
  tensor, ulysses = sizes["tensor"], sizes["context_ulysses"]
  if isinstance(mixer, ConvConfig):
    _check_divides("model.D", D, sizes, "tensor")
  else:
    _check_divides(f"{path}.K", mixer.K, sizes, "tensor")
    split = ("tensor", "context_ulysses") if isinstance(mixer, AttentionConfig) else ("tensor",)
    _check_divides(f"{path}.N", mixer.N, sizes, *split)
  if isinstance(mixer, AttentionConfig):
    heads = mixer.K // tensor
    rule = f"its K / mesh.tensor={heads} key heads of a device must be a multiple or a divisor of "
    rule += f"mesh.context_ulysses={ulysses}"
    check(heads % ulysses == 0 or ulysses % heads == 0, f"{path}.K", mixer.K, rule)
    return
  for axis in ("context_ring", "context_ulysses"):
    rule = f"{path} is a {type(mixer).__name__}, which goes through whole rows; it must be 1"
    check(sizes[axis] == 1, f"mesh.{axis}", sizes[axis], rule)


def _check_stages(config: TrainConfig, sizes: dict[str, int]) -> None:
  """Raises UserError where the model cannot be cut into stages, or the schedule cannot run."""
  if sizes["stage"] == 1:
    rule = "there is one stage, mesh.stage=1"
    layers = config.pipeline.layers_per_stage
    check(not layers, "pipeline.layers_per_stage", layers, rule)
    return
  schedule = make_schedule(config, sizes["stage"])
  repeats = [(len(specs), repeats) for specs, repeats in config.model.stacks]
  cut_layers(repeats, schedule.stages, config.pipeline.layers_per_stage)


def _check_divides(path: str, size: int, sizes: dict[str, int], *axes: str) -> None:
  """Raises UserError unless the axes, those of more than one device, split the size evenly."""
  active = [axis for axis in axes if sizes[axis] > 1]
  parts = math.prod(sizes[axis] for axis in active)
  names = " x ".join(f"mesh.{axis}" for axis in active)
  check(size % parts == 0, path, size, f"must be a multiple of {names}={parts}")
