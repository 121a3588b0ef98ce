"""What accelerators can do at most, per device as JAX counts devices; every figure has its source.

Vendors' tables mix conventions; here FLOP/s are dense (half of NVIDIA's figures "with sparsity") and bytes per second
over the interconnect are what one device can send (half of a "bidirectional" figure). No jax is imported.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device; None where no source states the figure or the hardware has no such unit."""

  name: str
  """key in `CHIPS`"""
  device_kinds: tuple[str, ...]
  """`jax.Device.device_kind` of this chip"""
  bf16_flops: float | None
  """dense bfloat16 matmul FLOP/s"""
  int8_flops: float | None
  """dense int8 matmul operations per second"""
  fp8_flops: float | None
  """dense 8-bit floating point matmul FLOP/s"""
  hbm_bytes: float
  """memory as the vendor states it; what a program can allocate differs by some percent"""
  hbm_bytes_per_s: float
  """memory bandwidth"""
  interconnect_bytes_per_s: float | None
  """bytes per second sent over all ICI or NVLink links together"""
  source: str
  """where the figures are from"""


_GIB = 2.0**30
_GOOGLE_TPU7X = "docs.cloud.google.com/tpu/docs/tpu7x, which tables v5p, v6e and tpu7x"
_H100_TABLE = "NVIDIA H100 specifications with sparsity, halved (archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html)"

CHIPS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      device_kinds=("TPU v4",),
      bf16_flops=275e12,
      int8_flops=275e12,
      fp8_flops=None,
      hbm_bytes=32 * _GIB,
      hbm_bytes_per_s=1200e9,
      interconnect_bytes_per_s=6 * 45e9,
      source="docs.cloud.google.com/tpu/docs/v4; ICI: How to Scale Your Model, chapter 2 (45 GB/s for each of 6 links)",
    ),
    Chip(
      name="v5e",
      device_kinds=("TPU v5 lite", "TPU v5e"),
      bf16_flops=197e12,
      int8_flops=393e12,
      fp8_flops=None,
      hbm_bytes=16 * _GIB,
      hbm_bytes_per_s=819e9,
      interconnect_bytes_per_s=400e9 / 2,
      source="cloud.google.com/tpu/docs/v5e (whose 16 GB are 16 GiB by jax's tpu_info)",
    ),
    Chip(
      name="v5p",
      device_kinds=("TPU v5", "TPU v5p"),
      bf16_flops=459e12,
      int8_flops=918e12,
      fp8_flops=459e12,
      hbm_bytes=95 * _GIB,
      hbm_bytes_per_s=2765e9,
      interconnect_bytes_per_s=1200e9 / 2,
      source=f"{_GOOGLE_TPU7X}; int8: jax's tpu_info",
    ),
    Chip(
      name="v6e",
      device_kinds=("TPU v6 lite", "TPU v6e"),
      bf16_flops=918e12,
      int8_flops=1836e12,
      fp8_flops=918e12,
      hbm_bytes=32 * _GIB,
      hbm_bytes_per_s=1638e9,
      interconnect_bytes_per_s=800e9 / 2,
      source=f"{_GOOGLE_TPU7X}; int8: jax's tpu_info (1.84e15, twice bf16)",
    ),
    Chip(  # a chip is two devices
      name="tpu7x",
      device_kinds=("TPU7x",),
      bf16_flops=2307e12 / 2,
      int8_flops=None,
      fp8_flops=4614e12 / 2,
      hbm_bytes=192 * _GIB / 2,
      hbm_bytes_per_s=7380e9 / 2,
      interconnect_bytes_per_s=1200e9 / 2 / 2,
      source=f"{_GOOGLE_TPU7X}, halved per device; no int8 unit: jax's tpu_info",
    ),
    Chip(
      name="a100-40gb",
      device_kinds=("NVIDIA A100-SXM4-40GB",),
      bf16_flops=312e12,
      int8_flops=624e12,
      fp8_flops=None,
      hbm_bytes=40e9,
      hbm_bytes_per_s=1555e9,
      interconnect_bytes_per_s=300e9,
      source="NVIDIA A100 datasheet 1758950 (tabled at glennklockwood.com/garden/processors/A100)",
    ),
    Chip(
      name="a100-80gb",
      device_kinds=("NVIDIA A100-SXM4-80GB",),
      bf16_flops=312e12,
      int8_flops=624e12,
      fp8_flops=None,
      hbm_bytes=80e9,
      hbm_bytes_per_s=2039e9,
      interconnect_bytes_per_s=300e9,
      source="NVIDIA A100 datasheet 1758950 (tabled at glennklockwood.com/garden/processors/A100)",
    ),
    Chip(
      name="h100-sxm",
      device_kinds=("NVIDIA H100 80GB HBM3",),
      bf16_flops=1979e12 / 2,
      int8_flops=3958e12 / 2,
      fp8_flops=3958e12 / 2,
      hbm_bytes=80e9,
      hbm_bytes_per_s=3350e9,
      interconnect_bytes_per_s=900e9 / 2,
      source=_H100_TABLE,
    ),
    Chip(
      name="h100-pcie",
      device_kinds=("NVIDIA H100 PCIe",),
      bf16_flops=1513e12 / 2,
      int8_flops=3026e12 / 2,
      fp8_flops=3026e12 / 2,
      hbm_bytes=80e9,
      hbm_bytes_per_s=2000e9,
      interconnect_bytes_per_s=600e9 / 2,
      source=_H100_TABLE,
    ),
    Chip(
      name="h200",
      device_kinds=("NVIDIA H200",),
      bf16_flops=1979e12 / 2,
      int8_flops=3958e12 / 2,
      fp8_flops=3958e12 / 2,
      hbm_bytes=141e9,
      hbm_bytes_per_s=4800e9,
      interconnect_bytes_per_s=900e9 / 2,
      source="NVIDIA H200 datasheet (tabled at github.com/astroC86/gpu-datasheet); NVLink as H100",
    ),
    Chip(
      name="b200",
      device_kinds=("NVIDIA B200",),
      bf16_flops=2250e12,
      int8_flops=4500e12,
      fp8_flops=4500e12,
      hbm_bytes=1440e9 / 8,
      hbm_bytes_per_s=64e12 / 8,
      interconnect_bytes_per_s=14.4e12 / 8 / 2,
      source="NVIDIA Blackwell brief, HGX at 1000 W (tabled at glennklockwood.com/garden/processors/B200); "
      "memory and NVLink: nvidia.com/en-us/data-center/dgx-b200, an eighth",
    ),
    Chip(
      name="l4",
      device_kinds=("NVIDIA L4",),
      bf16_flops=242e12 / 2,
      int8_flops=485e12 / 2,
      fp8_flops=485e12 / 2,
      hbm_bytes=24e9,
      hbm_bytes_per_s=300e9,
      interconnect_bytes_per_s=None,
      source="NVIDIA L4 figures with sparsity, halved (tabled at yobitel.com/knowledge-base/nvidia-l4); PCIe only",
    ),
    Chip(  # Turing multiplies float16, not bfloat16
      name="t4",
      device_kinds=("Tesla T4",),
      bf16_flops=None,
      int8_flops=130e12,
      fp8_flops=None,
      hbm_bytes=16e9,
      hbm_bytes_per_s=320e9,
      interconnect_bytes_per_s=None,
      source="NVIDIA T4 announcement (tabled at networkoutlet.com and sysrqmts.com/en/gpus/nvidia/tesla/t4); PCIe only",
    ),
  )
}


def find_chip(device_kind: str) -> Chip | None:
  """The chip whose `jax.Device.device_kind` is exactly this; None for any other, since a near name is another chip."""
  return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
