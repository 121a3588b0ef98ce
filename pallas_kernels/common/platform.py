"""Finds the platform that an operation is traced for: the mesh's in ahead-of-time compilation."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax


def platform() -> str:
  """Returns "cpu", "gpu" or "tpu": the current mesh's platform, else the default backend."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
  """Returns the `device_kind` of the current mesh's devices, else of the first default device."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def why_no_tpu(interpret: Any) -> str | None:
  """Returns why a TPU kernel cannot run on this device under `interpret`, or None if it can."""
  from jax.experimental.pallas import tpu as pltpu

  if not isinstance(interpret, bool | pltpu.InterpretParams):
    return f"interpret={interpret!r} is neither True nor pltpu.InterpretParams"
  if not interpret and "tpu" not in device_kind().lower():
    return (
      f"the device is {device_kind()!r}, not a TPU; interpret=True or pltpu.InterpretParams() "
      "runs the kernel on CPU"
    )
  return None


@functools.cache
def log_once(operation: str, implementation: str, platform: str) -> None:
  """Logs, once per process for each combination, which implementation runs an operation where."""
  logging.getLogger(__name__).info("%s runs %s on %s", operation, implementation, platform)
