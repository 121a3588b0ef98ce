"""The TPU chips that schedules are read for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device as JAX sees it: two cores on v5p (megacore), one on the others.

  Rates, sizes and MXU counts: `jax/_src/pallas/mosaic/tpu_info.py`. clock is the bfloat16 peak over the MACs of a
  cycle; mxu_cycles and delay_slots are read off the compiler's listings.
  """

  topology: str
  """name for jax.experimental.topologies.get_topology_desc"""
  cores: int
  """TensorCores that share one device"""
  clock: float
  """GHz"""
  mxus: int
  """of one core"""
  mxu_side: int
  """rows and columns of the systolic array"""
  mxu_cycles: int
  """cycles that 8 sublanes of 32-bit data keep an MXU busy"""
  bandwidth: float
  """HBM GB/s of the device"""
  delay_slots: int
  """bundles after a branch that still execute"""
  peaks: dict[str, float]
  """dense TFLOP/s (TOP/s) of the device by operand kind"""


CHIPS = {
  "v5e": Chip(
    topology="v5e:2x4",
    cores=1,
    clock=1.50,
    mxus=4,
    mxu_side=128,
    mxu_cycles=8,
    bandwidth=820,
    delay_slots=4,
    peaks=dict(bf16=197, s8=394, s4=788),
  ),
  "v5p": Chip(
    topology="v5p:2x2x2",
    cores=2,
    clock=1.75,
    mxus=4,
    mxu_side=128,
    mxu_cycles=8,
    bandwidth=2460,
    delay_slots=4,
    peaks=dict(bf16=459, s8=918, s4=1840),
  ),
  "v6e": Chip(
    topology="v6e:2x4",
    cores=1,
    clock=1.75,
    mxus=2,
    mxu_side=256,
    mxu_cycles=4,
    bandwidth=1640,
    delay_slots=4,
    peaks=dict(bf16=918, s8=1840, s4=3680),
  ),
  "tpu7x": Chip(
    topology="tpu7x:2x2x1",
    cores=1,
    clock=2.20,
    mxus=2,
    mxu_side=256,
    mxu_cycles=4,
    bandwidth=3700,
    delay_slots=6,
    peaks=dict(bf16=1155, f8=2300),
  ),
}
