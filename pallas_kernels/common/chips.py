"""Lists accelerators in the project's one table, per device as JAX counts them. Imports no jax.

Vendors mix conventions. Here FLOP/s are dense (half of NVIDIA's figures "with sparsity"), rates
and sizes are in FLOP/s, bytes and bytes/s, and the interconnect is what one device can send (half
of a "bidirectional" figure). Where a chip is two devices, each has half of everything.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorCore:
  """Describes a TPU core as its compiler schedules it.

  Units, VMEM: jax's `tpu_info`. Clock: the bfloat16 peak over the multiply-adds of a cycle.
  `mxu_cycles` and `delay_slots` are read off the compiler's listings.
  """

  topology: str
  """Name for `jax.experimental.topologies.get_topology_desc`."""
  count: int
  """Cores that share one device: two on v4 and v5p ("megacore"), one on the others."""
  clock: float
  """Cycles per second."""
  mxus: int
  """Matrix units of one core."""
  mxu_side: int
  """Rows and columns of a matrix unit's systolic array."""
  mxu_cycles: int
  """Cycles for which 8 sublanes of 32-bit data keep a matrix unit busy; bfloat16 packs two."""
  vmem_bytes: int
  """Vector memory of one core."""
  delay_slots: int
  """Bundles after a branch that still execute."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Describes one device; None where no source states the figure or there is no such unit."""

  name: str
  """Key in `CHIPS`."""
  device_kinds: tuple[str, ...]
  """Values of `jax.Device.device_kind` for this chip."""
  bf16_flops: float | None
  """Dense bfloat16 matmul FLOP/s."""
  int8_flops: float | None
  """Dense int8 matmul operations per second."""
  fp8_flops: float | None
  """Dense 8-bit floating-point matmul FLOP/s."""
  int4_flops: float | None = None
  """Dense int4 matmul operations per second."""
  hbm_bytes: float
  """Memory as the vendor states it; what a program can allocate differs by some percent."""
  hbm_bytes_per_s: float
  """Memory bandwidth."""
  interconnect_bytes_per_s: float | None
  """Bytes per second sent over all ICI or NVLink links together, as the vendor states it."""
  devices_per_chip: int = 1
  """Devices, as JAX counts them, of one chip."""
  torus_axes: int = 0
  """Axes of a TPU's network; each has two links."""
  link_bytes_per_s: float | None = None
  """What a device reaches over one ICI link in one direction: about 0.9 of the vendor's figure."""
  ring_multiple: int = 0
  """Axes of so many chips, or a multiple, have links that close the ring."""
  pod_chips: int | None = None
  """Chips of the largest network without DCN."""
  topology_options: tuple[tuple[str, Any], ...] = ()
  """What libtpu needs to describe a topology in which devices are as JAX counts them."""
  node_devices: int = 0
  """GPUs that NVLink joins."""
  node_bytes_per_s: float | None = None
  """Bytes per second that such a node sends to other nodes."""
  dcn_bytes_per_s: float | None = None
  """Bytes per second of one TPU device to other slices, over the data-centre network."""
  pcie_bytes_per_s: float | None = None
  """Bytes per second between a device and its host."""
  core: TensorCore | None = None
  """Of a TPU whose schedules can be read (`pallas_kernels.schedule`)."""
  source: str
  """Where the figures are from."""


_GIB = 2.0**30
_MIB = 2**20
_TPU_INFO = "jax's tpu_info"
_TPU7X = "docs.cloud.google.com/tpu/docs/tpu7x (tables v5p, v6e and tpu7x)"
_H100 = (
  "NVIDIA H100 specifications with sparsity, halved "
  "(archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html)"
)
_A100 = "NVIDIA A100 datasheet 1758950 (tabled at glennklockwood.com/garden/processors/A100)"

_BOOK = "links, DCN, PCIe: How to Scale Your Model, chapter 2 (jax-ml.github.io/scaling-book, 2025)"
_NODES = "nodes: the same book's chapter on GPUs"

_CHIPS = (
  Chip(  # a chip is two devices
    name="v3",
    device_kinds=("TPU v3",),
    bf16_flops=140e12 / 2,
    int8_flops=140e12 / 2,
    fp8_flops=None,
    hbm_bytes=32 * _GIB / 2,
    hbm_bytes_per_s=900e9 / 2,
    interconnect_bytes_per_s=None,
    devices_per_chip=2,
    torus_axes=2,
    link_bytes_per_s=100e9 / 2,
    ring_multiple=32,
    pod_chips=1024,
    source="How to Scale Your Model, chapter 2, halved per device; pod of 32 x 32 chips: "
    "Jouppi et al. 2020, doi 10.1145/3360307",
  ),
  Chip(
    name="v4",
    device_kinds=("TPU v4",),
    bf16_flops=275e12,
    int8_flops=275e12,
    fp8_flops=None,
    hbm_bytes=32 * _GIB,
    hbm_bytes_per_s=1200e9,
    interconnect_bytes_per_s=6 * 45e9,
    torus_axes=3,
    link_bytes_per_s=45e9,
    ring_multiple=4,
    pod_chips=4096,
    topology_options=(("chip_config_name", "megacore"),),
    dcn_bytes_per_s=6.25e9,
    pcie_bytes_per_s=16e9,
    source=f"docs.cloud.google.com/tpu/docs/v4 (32 GiB, 1200 GBps; {_TPU_INFO} has 1230); "
    f"{_BOOK} (ICI: 45 GB/s for each of 6 links)",
  ),
  Chip(
    name="v5e",
    device_kinds=("TPU v5 lite", "TPU v5e"),
    bf16_flops=197e12,
    int8_flops=393e12,
    fp8_flops=None,
    int4_flops=788e12,
    hbm_bytes=16 * _GIB,
    hbm_bytes_per_s=819e9,
    interconnect_bytes_per_s=400e9 / 2,
    torus_axes=2,
    link_bytes_per_s=45e9,
    ring_multiple=16,
    pod_chips=256,
    dcn_bytes_per_s=3.125e9,
    pcie_bytes_per_s=16e9,
    core=TensorCore(
      topology="v5e:2x4",
      count=1,
      clock=1.50e9,
      mxus=4,
      mxu_side=128,
      mxu_cycles=8,
      vmem_bytes=128 * _MIB,
      delay_slots=4,
    ),
    source=f"docs.cloud.google.com/tpu/docs/v5e (its 16 GB are 16 GiB by {_TPU_INFO}); "
    f"int4: {_TPU_INFO}; {_BOOK}",
  ),
  Chip(
    name="v5p",
    device_kinds=("TPU v5", "TPU v5p"),
    bf16_flops=459e12,
    int8_flops=918e12,
    fp8_flops=459e12,
    int4_flops=1840e12,
    hbm_bytes=95 * _GIB,
    hbm_bytes_per_s=2765e9,
    interconnect_bytes_per_s=1200e9 / 2,
    torus_axes=3,
    link_bytes_per_s=90e9,
    ring_multiple=4,
    pod_chips=8960,
    dcn_bytes_per_s=6.25e9,
    pcie_bytes_per_s=16e9,
    core=TensorCore(
      topology="v5p:2x2x2",
      count=2,
      clock=1.75e9,
      mxus=4,
      mxu_side=128,
      mxu_cycles=8,
      vmem_bytes=64 * _MIB,
      delay_slots=4,
    ),
    source="docs.cloud.google.com/tpu/docs/v5p, whose 2765 GBps (2024) became 2575 GiBps (2025), "
    f"the same rate; {_TPU_INFO} has 2460 GB/s. int8, int4: {_TPU_INFO}; {_BOOK}",
  ),
  Chip(
    name="v6e",
    device_kinds=("TPU v6 lite", "TPU v6e"),
    bf16_flops=918e12,
    int8_flops=1836e12,
    fp8_flops=918e12,
    int4_flops=3680e12,
    hbm_bytes=32 * _GIB,
    hbm_bytes_per_s=1638e9,
    interconnect_bytes_per_s=800e9 / 2,
    torus_axes=2,
    link_bytes_per_s=90e9,
    ring_multiple=16,
    pod_chips=256,
    dcn_bytes_per_s=12.5e9,
    pcie_bytes_per_s=32e9,
    core=TensorCore(
      topology="v6e:2x4",
      count=1,
      clock=1.75e9,
      mxus=2,
      mxu_side=256,
      mxu_cycles=4,
      vmem_bytes=128 * _MIB,
      delay_slots=4,
    ),
    source=f"{_TPU7X}; int8: docs.cloud.google.com/tpu/docs/v6e; int4: {_TPU_INFO}; {_BOOK}",
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
    devices_per_chip=2,
    torus_axes=3,
    link_bytes_per_s=1200e9 / 2 / 6 / 2,
    ring_multiple=4,
    pod_chips=9216,
    dcn_bytes_per_s=12.5e9 / 2,
    core=TensorCore(
      topology="tpu7x:2x2x1",
      count=1,
      clock=2.20e9,
      mxus=2,
      mxu_side=256,
      mxu_cycles=4,
      vmem_bytes=64 * _MIB,
      delay_slots=6,
    ),
    source=f"{_TPU7X}, halved per device; no integer matrix unit: {_TPU_INFO}; link: the nominal "
    "figure; assumed: rings as on v5p, DCN as on v6e",
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
    source=_A100,
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
    source=_A100,
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
    node_devices=8,
    node_bytes_per_s=400e9,
    source=f"{_H100}; {_NODES}",
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
    source=_H100,
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
    node_devices=8,
    node_bytes_per_s=400e9,
    source="NVIDIA H200 datasheet (tabled at github.com/astroC86/gpu-datasheet); NVLink and "
    "nodes as H100",
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
    node_devices=8,
    node_bytes_per_s=400e9,
    source="NVIDIA Blackwell brief, HGX at 1000 W (tabled at "
    "glennklockwood.com/garden/processors/B200); memory and NVLink: "
    f"nvidia.com/en-us/data-center/dgx-b200, an eighth; {_NODES}",
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
    source="NVIDIA L4 figures with sparsity, halved (tabled at "
    "yobitel.com/knowledge-base/nvidia-l4); PCIe only",
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
    source="NVIDIA T4 announcement (tabled at networkoutlet.com and "
    "sysrqmts.com/en/gpus/nvidia/tesla/t4); PCIe only",
  ),
)

CHIPS = {chip.name: chip for chip in _CHIPS}
CORES = {chip.name: chip.core for chip in _CHIPS if chip.core is not None}
"""The TPUs that kernels are compiled and scheduled for ahead of time."""


def find_chip(device_kind: str) -> Chip | None:
  """Returns the chip with exactly this `jax.Device.device_kind`; None for a near name."""
  return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
