"""Fills in and checks what a configuration leaves to the checkpoint, the text and the devices."""

from __future__ import annotations

import dataclasses

import jax

from jaxlm.config import TrainConfig, check
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.interop import huggingface


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

  The checkpoint's tokenizer takes the place of `bytes`. Raises UserError like `huggingface.load`.
  """
  if not config.init:
    return config
  folder = huggingface.local_folder(config.init)
  model, _, _ = huggingface.inspect(folder, "float32")
  data = config.data
  if data.tokenizer == "bytes" and (folder / TOKENIZER_FILE).is_file():
    data = dataclasses.replace(data, tokenizer=str(folder / TOKENIZER_FILE))
  return dataclasses.replace(config, model=model, data=data)


def check_mesh(config: TrainConfig, devices: int | None = None) -> None:
  """Raises UserError where the model does not divide over the mesh or cannot use an axis of it.

  The mesh is one of `devices`, by default of those that are here.
  """
  sizes = config.mesh.resolve(jax.device_count() if devices is None else devices)
  for axis in ("stage", "context_ring", "context_ulysses", "expert"):
    rule = "the model does not use this axis; it must be 1"
    check(sizes[axis] == 1, f"mesh.{axis}", sizes[axis], rule)
  model, fsdp, tensor = config.model, sizes["fsdp"], sizes["tensor"]
  check(model.D % fsdp == 0, "model.D", model.D, f"must be a multiple of mesh.fsdp={fsdp}")
  split_by_tensor = {"data.length": config.data.length, "model.V": model.V}
  for group in ("prefix", "pattern", "remainder"):
    for position, spec in enumerate(getattr(model, group)):
      path = f"model.{group}.{position}"
      split_by_tensor |= {
        f"{path}.mixer.N": spec.mixer.N,
        f"{path}.mixer.K": spec.mixer.K,
        f"{path}.feedforward.F": spec.feedforward.F,
      }
  for path, size in split_by_tensor.items():
    check(size % tensor == 0, path, size, f"must be a multiple of mesh.tensor={tensor}")
