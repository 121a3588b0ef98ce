"""Finds the platform that an operation is traced for, and the implementation that runs there.

The platform is the mesh's, so that ahead-of-time compilation chooses like its target.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.common.checks import check, check_choice
from pallas_kernels.common.errors import UnsupportedError


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


def why_no_hopper(interpret: Any) -> str | None:
  """Returns why a Hopper kernel cannot run on this device under `interpret`, or None if it can."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if not interpret:
    hopper = any(name in device_kind() for name in ("H100", "H200", "GH200"))
    return None if hopper else f"the device is {device_kind()!r}, not a Hopper GPU"
  params = getattr(plgpu, "InterpretGPUParams", None)
  if params is None:
    return (
      f"interpret={interpret!r} needs the GPU simulator of jax 0.11, this is jax {jax.__version__}"
    )
  if interpret is not True and not isinstance(interpret, params):
    return f"interpret={interpret!r} is neither True nor plgpu.InterpretGPUParams"
  return None


def choose_implementation(
  operation: str,
  implementation: str | None,
  kernels: Mapping[str, str],
  unsupported: Callable[[str], str | None],
  interpret: Any,
) -> str:
  """Returns the implementation that runs an operation: "reference", "xla" or one of `kernels`.

  A named implementation is returned or refused. None takes the kernel of the platform if it can run
  the call, else "xla", and logs which, with the reason.

  Args:
    operation: its name, for the log.
    implementation: what the caller asked for.
    kernels: the kernel of each platform that has one, such as {"tpu": "pallas_tpu"}.
    unsupported: returns why one of `kernels` cannot run the call (a field, its value and the rule),
      or None if it can.
    interpret: what the caller asked for; only a named kernel can be interpreted.

  Raises:
    UserError: an unknown implementation, or `interpret` without a named kernel.
    UnsupportedError: the named kernel cannot run the call.
  """
  names = tuple(kernels.values())
  check_choice("implementation", implementation, (None, "reference", "xla", *names))
  rule = f"needs implementation= one of {list(names)}"
  check(not interpret or implementation in names, "interpret", interpret, rule)
  name = kernels.get(platform(), "xla") if implementation is None else implementation
  reason = unsupported(name) if name in names else None
  if implementation is None:
    log_once(operation, name if reason is None else f"xla ({name}: {reason})", platform())
    return name if reason is None else "xla"
  if reason is not None:
    raise UnsupportedError(f"implementation={implementation!r}: {reason}")
  return name


@functools.cache
def log_once(operation: str, implementation: str, platform: str) -> None:
  """Logs, once per process for each combination, which implementation runs an operation where."""
  logging.getLogger(__name__).info("%s runs %s on %s", operation, implementation, platform)
