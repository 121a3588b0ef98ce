"""What a configuration leaves to the checkpoint, the text and the devices of a run, filled in and checked."""

from __future__ import annotations

import dataclasses

import jax

from jaxlm.config import TrainConfig, check
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.interop import huggingface


def with_vocabulary(config: TrainConfig, vocab_size: int) -> TrainConfig:
  if config.model.V >= vocab_size:
    return config
  rule = f"has {vocab_size} ids, more than the V={config.model.V} of init={config.init!r}"
  check(not config.init, "data.tokenizer", config.data.tokenizer, rule)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, V=vocab_size))


def with_initial_model(config: TrainConfig) -> TrainConfig:
  """With the model of the checkpoint that training starts from, and its tokenizer in place of `bytes`, if it has one.

  ValueError as `huggingface.load`.
  """
  if not config.init:
    return config
  folder = huggingface.local_folder(config.init)
  model, _, _ = huggingface.inspect(folder, "float32")
  data = config.data
  if data.tokenizer == "bytes" and (folder / TOKENIZER_FILE).is_file():
    data = dataclasses.replace(data, tokenizer=str(folder / TOKENIZER_FILE))
  return dataclasses.replace(config, model=model, data=data)


def check_mesh(config: TrainConfig) -> None:
  """Raises UserError where the model does not divide over the mesh or cannot use one of its axes."""
  sizes = config.mesh.resolve(jax.device_count())
  for axis in ("stage", "context_ring", "context_ulysses", "expert"):
    check(
      sizes[axis] == 1,
      f"mesh.{axis}",
      sizes[axis],
      "the model does not use this axis; it must be 1",
    )
  model, tensor = config.model, sizes["tensor"]
  check(
    config.data.length % tensor == 0,
    "data.length",
    config.data.length,
    f"must be a multiple of {tensor=}",
  )
  check(
    model.D % sizes["fsdp"] == 0,
    "model.D",
    model.D,
    f"must be a multiple of mesh.fsdp={sizes['fsdp']}",
  )
  rule = f"must be a multiple of mesh.tensor={tensor}"
  check(model.V % tensor == 0, "model.V", model.V, rule)
  for spec in model.layer_specs:
    for name, size in (("mixer.N", spec.mixer.N), ("mixer.K", spec.mixer.K)):
      check(size % tensor == 0, name, size, rule)
    check(spec.feedforward.F % tensor == 0, "feedforward.F", spec.feedforward.F, rule)
