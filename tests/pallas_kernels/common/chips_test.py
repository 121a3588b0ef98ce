"""The chip table: lookups, units, and agreement with the figures that JAX itself ships for TPUs."""

import collections
import subprocess
import sys

import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.chips import CHIPS, CORES, find_chip

JAX_TPUS = {
  "v4": (pltpu.ChipVersion.TPU_V4, 2),
  "v5e": (pltpu.ChipVersion.TPU_V5E, 1),
  "v5p": (pltpu.ChipVersion.TPU_V5P, 2),
  "v6e": (pltpu.ChipVersion.TPU_V6E, 1),
  "tpu7x": (pltpu.ChipVersion.TPU_7X, 1),
}
# What jax states otherwise than Google's pages: (our figure, jax's), both exact.
DISAGREEMENTS = {
  ("v4", "hbm_bytes_per_s"): (1200e9, 1230e9),
  ("v5p", "hbm_bytes_per_s"): (2765e9, 2460e9),
  ("v5p", "hbm_bytes"): (95 * 2**30, 103e9),
}
# jax rounds to three digits, so the two figures may differ by half a unit of the third: 0.5 %.
ROUNDING = 0.005


@pytest.mark.parametrize(
  "kind, name",
  [
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU7x", "tpu7x"),
    ("NVIDIA H100 80GB HBM3", "h100-sxm"),
    ("NVIDIA H100 PCIe", "h100-pcie"),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
  ],
)
def test_known_kinds_are_found(kind, name):
  assert find_chip(kind) is CHIPS[name]


@pytest.mark.parametrize(
  "kind", ["cpu", "", "TPU", "TPU v5 ", "NVIDIA H100", "NVIDIA H100 NVL", "NVIDIA L40S"]
)
def test_other_kinds_are_not_guessed(kind):
  assert find_chip(kind) is None


def test_no_kind_names_two_chips():
  kinds = collections.Counter(kind for chip in CHIPS.values() for kind in chip.device_kinds)
  assert [kind for kind, count in kinds.items() if count > 1] == []


@pytest.mark.parametrize("name", JAX_TPUS)
def test_rates_and_memory_agree_with_jax_or_differ_as_stated(name):
  version, cores = JAX_TPUS[name]
  chip, info = CHIPS[name], pltpu.get_tpu_info_for_chip(version, cores)
  theirs = {
    "bf16_flops": info.bf16_ops_per_second,
    "int8_flops": info.int8_ops_per_second,
    "fp8_flops": info.fp8_ops_per_second,
    "int4_flops": info.int4_ops_per_second,
    "hbm_bytes_per_s": info.mem_bw_bytes_per_second,
    "hbm_bytes": info.hbm_capacity_bytes,
  }
  for field, per_core in theirs.items():
    pair = (getattr(chip, field), per_core * cores)
    if (name, field) in DISAGREEMENTS:
      assert pair == DISAGREEMENTS[name, field]
    elif None not in pair and pair[1] != 0:
      assert pair[0] == pytest.approx(pair[1], rel=ROUNDING)


@pytest.mark.parametrize("name", CORES)
def test_cores_are_those_of_jax(name):
  version, cores = JAX_TPUS[name]
  core, info = CORES[name], pltpu.get_tpu_info_for_chip(version, cores)
  assert core is CHIPS[name].core
  ours = (core.count, core.mxus, core.mxu_side, core.vmem_bytes)
  assert ours == (info.num_cores, info.num_mxus, info.mxu_column_size, info.vmem_capacity_bytes)
  # bfloat16 rows that enter a matrix unit in a cycle: two per sublane of 32-bit data
  rows = 2 * 8 / (2 * core.mxu_cycles)
  peak = 2 * rows * core.count * core.mxus * core.mxu_side**2 * core.clock
  assert peak == pytest.approx(CHIPS[name].bf16_flops, rel=ROUNDING)


def test_both_of_googles_figures_for_the_bandwidth_of_v5p_are_the_tables():
  gigabytes, gibibytes = 2765e9, 2575 * 2**30
  assert CHIPS["v5p"].hbm_bytes_per_s == gigabytes == pytest.approx(gibibytes, rel=1e-4)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_magnitudes_rule_out_a_wrong_unit_or_sparse_figure(chip):
  assert 10e9 < chip.hbm_bytes < 400e9
  assert 0.02 < chip.hbm_bytes / chip.hbm_bytes_per_s < 0.1  # seconds to read the whole memory
  if chip.bf16_flops is not None:
    assert 100 < chip.bf16_flops / chip.hbm_bytes_per_s < 600
    for eight_bit in (chip.int8_flops, chip.fp8_flops):
      assert eight_bit is None or 0.99 < eight_bit / chip.bf16_flops < 2.01
  if chip.interconnect_bytes_per_s is not None:
    assert 3 < chip.hbm_bytes_per_s / chip.interconnect_bytes_per_s < 15
  assert chip.source


def test_the_table_of_sharding_is_this_one():
  code = (
    "import sys, sharding.hardware, pallas_kernels.common.chips, pallas_kernels.common.checks\n"
    "assert sharding.hardware.CHIPS is pallas_kernels.common.chips.CHIPS\n"
    "sys.exit('jax' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
