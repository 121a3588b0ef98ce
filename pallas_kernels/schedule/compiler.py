"""Compiles for a TPU that is not there, on request with the listings that libtpu writes."""

from __future__ import annotations

import atexit
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels.common.chips import CORES
from pallas_kernels.common.topology import topology_devices


@functools.cache
def dump_folder() -> pathlib.Path:
  """Returns the folder that libtpu writes listings to; it is removed when the process ends.

  A program of a large shape has hundreds of MiB of them and takes three times as long to compile,
  so that only `compile_with_listings` asks for the folder. Raises RuntimeError when this process
  compiled for a TPU before: libtpu reads its flags once.
  """
  if topology_devices.cache_info().currsize:
    raise RuntimeError(
      "libtpu was loaded in this process without the flags that make it write listings: "
      "call pallas_kernels.schedule.analyse before anything else compiles for a TPU"
    )
  folder = tempfile.mkdtemp(prefix="tpu_schedule_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
  os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
  return pathlib.Path(folder)


@functools.cache
def chip_mesh(
  chip: str, shape: tuple[int, ...] = (1,), names: tuple[str, ...] = ("x",)
) -> jax.sharding.Mesh:
  """Returns a mesh of `chip`'s devices with Explicit axes, to compile for."""
  described = topology_devices(CORES[chip].topology)
  devices: Any = np.array(described[: int(np.prod(shape))]).reshape(shape)
  return jax.sharding.Mesh(
    devices, names, axis_types=(jax.sharding.AxisType.Explicit,) * len(names)
  )


def compile_for(fn: Callable[..., Any], args: Any, chip: str) -> Any:
  """Compiles `fn` for one device of `chip`; args are arrays or ShapeDtypeStructs."""
  mesh = chip_mesh(chip)
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tuple(args)
  )
  with jax.set_mesh(mesh):
    # A new function, so that nothing comes from jit's cache.
    return jax.jit(lambda *args: fn(*args)).lower(*shapes).compile()


def compile_with_listings(
  fn: Callable[..., Any], args: Any, chip: str
) -> tuple[Any, dict[str, dict[str, str]]]:
  """Returns the compiled program and, for each kernel in it, three listings by short name.

  Raises RuntimeError when libtpu was in use before and does not write listings.
  """
  folder = dump_folder()
  compiled = compile_for(fn, args, chip)
  listings: dict[str, dict[str, str]] = {}
  kinds = {
    "bundles": r"packed-bundles-post-ra\.txt",
    "use": r"pre-delay_hlo-static-per-bundle-utilization\.txt",
    "original": r"original\.txt",
  }
  for path in sorted(folder.iterdir()):
    for kind, pattern in kinds.items():
      if name := re.fullmatch(rf"\d+-([^<].*?)-\d+-{pattern}", path.name):
        listings.setdefault(name[1], {})[kind] = path.read_text()
    path.unlink() if path.is_file() else shutil.rmtree(path)
  if not listings:
    raise RuntimeError(
      "libtpu wrote no listings: it was loaded in this process before pallas_kernels.schedule "
      "was used, or the program came from JAX's persistent compilation cache"
    )
  return compiled, listings
