"""Schedules of real kernels, compiled ahead of time, against cycles and bytes counted by hand."""

# M, K, N sizes of a matrix product
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.chips import CHIPS, CORES
from pallas_kernels.schedule import Finding, analyse
from pallas_kernels.schedule.report import chart, closing, report, row, table, unit_table
from pallas_kernels.schedule.traffic import pallas_calls
from tests.pallas_kernels.schedule.analysed import SHAPES, product

pytest.importorskip("libtpu")


@pytest.fixture(scope="module")
def found():
  """The findings of the kernels in analysed.py by name and chip."""
  program = [sys.executable, "-m", "tests.pallas_kernels.schedule.analysed"]
  printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout
  rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
  return {row.pop("name"): Finding(**row) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_cycles_of_a_product_on_128_wide_mxus(found, chip):
  """4 MXUs of 128 x 128, one row a cycle: M K N / 65536 cycles, shared by the cores."""
  by_hand = 4096 * 2048 * 4096 / (4 * 128 * 128) / CORES[chip].count
  matmul = found[f"product {chip}"]
  assert matmul.cycles == pytest.approx(by_hand, rel=0.05)
  assert matmul.flops == 2 * 4096 * 2048 * 4096
  assert matmul.operands == "bf16" and matmul.mxu_use > 0.95


@pytest.mark.slow
def test_bytes_of_a_product(found):
  left_once, right_8_times, out = 4096 * 2048 * 2, 8 * 2048 * 4096 * 2, 4096 * 4096 * 4
  matmul = found["product v5e"]
  assert matmul.hbm_bytes == left_once + right_8_times + out
  assert matmul.hbm_us == pytest.approx(matmul.hbm_bytes / CHIPS["v5e"].hbm_bytes_per_s * 1e6)


@pytest.mark.slow
def test_cycles_of_an_elementwise_kernel(found):
  """256 registers a step take 256 cycles of the one store slot; the pipeline adds fewer than 77."""
  copy = found["doubled v5e"]
  assert copy.operands == "none" and copy.mxu_use == 0
  assert copy.step_cycles == pytest.approx(256 * 1024 / 1024, rel=0.3)
  assert copy.us == max(copy.core_us, copy.hbm_us, copy.copy_us) == copy.hbm_us
  busy = copy.unit_cycles
  assert busy["VSTORE"] == 8 * 256 and busy["VLOAD"] == pytest.approx(8 * 256 / 3, rel=0.05)
  assert busy["VALU"] == pytest.approx(8 * 256 / 4, rel=0.1) and busy["MXU"] == busy["EUP"] == 0
  assert busy["HBM"] == pytest.approx(copy.hbm_us * CORES["v5e"].clock / 1e6)


@pytest.mark.slow
def test_splash_attention_beside_sparse_is_analysed():
  short_row = (
    "from pallas_kernels.schedule import report, sparse_cases\n"
    "sparse_cases.TOKENS = 2048\n"
    "case = next(sparse_cases.splash_cases())\n"
    "print(report.table([report.row(case, 'v5e')]))"
  )
  program = [sys.executable, "-c", short_row]
  run = subprocess.run(program, capture_output=True, text=True, check=True)
  cells = run.stdout.splitlines()[-1].split(" | ")
  assert cells[2] == "v5e" and 0.1 < float(cells[5].removesuffix("%")) / 100 < 1


@pytest.mark.slow
def test_listings_are_refused_where_libtpu_is_in_use_already():
  compiled_before = (
    "from tests.pallas_kernels.schedule.analysed import *\n"
    "from pallas_kernels.schedule.compiler import chip_mesh\n"
    "chip_mesh('v5e')\n"
    "analyse(product, SHAPES, 'v5e')"
  )
  run = subprocess.run([sys.executable, "-c", compiled_before], capture_output=True, text=True)
  assert run.returncode == 1 and "loaded in this process without the flags" in run.stderr


def calls_of(fn, *args):
  closed = jax.make_jaxpr(fn)(*args)
  return list(pallas_calls(closed.jaxpr, closed.consts, [None] * len(closed.jaxpr.invars)))


def test_calls_inside_a_scan_are_multiplied():
  def repeated(a, b):
    return jax.lax.scan(lambda carry, _: (carry, product(a, b)[0, 0]), 0.0, length=7)

  (call,) = calls_of(repeated, *SHAPES)
  assert call.calls == 7 and call.grid == (8, 8) and call.name == "product"


def test_index_read_from_a_prefetched_scalar():
  """A block that a scalar chooses is copied once, one that every step chooses at every step."""

  def kernel(chosen, x, out):
    out[...] = x[...]

  def gather(at, chosen, x):
    spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(8,),
      in_specs=[pl.BlockSpec((8, 128), lambda i, chosen: (chosen[at(i)], 0))],
      out_specs=pl.BlockSpec((8, 128), lambda i, chosen: (0, 0)),
    )
    return pl.pallas_call(
      kernel, grid_spec=spec, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32)
    )(chosen, x)

  chosen, x = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((64, 128), jnp.float32)
  block = 8 * 128 * 4
  (fixed,) = calls_of(functools.partial(gather, lambda i: 0), chosen, x)
  assert fixed.moved == 2 * block and not fixed.notes
  (moving,) = calls_of(functools.partial(gather, lambda i: i), chosen, x)
  assert moving.moved == 9 * block and "depends on data" in moving.notes[0]


def test_unknown_chip_and_case():
  with pytest.raises(ValueError, match="chip='v99': must be one of 'v5e'"):
    analyse(product, SHAPES, "v99")
  with pytest.raises(ValueError, match="names none of"):
    report("unused", match="no such kernel")
  with pytest.raises(ValueError, match="chips='v99': must be one of 'v5e', 'v5p'"):
    report("unused", chips=["v5e", "v99"])


def test_table_and_chart_show_errors_and_numbers():
  good = dict(
    name="a",
    shape="s",
    chip="v5e",
    cycles=2e6,
    mxu_use=0.9,
    of_peak=0.8,
    of_roofline=0.85,
    us=1700.0,
  )
  good |= dict(
    flops=4.0,
    counted_flops=6.0,
    notes=("stays in hbm",),
    hbm_us=500.0,
    hbm_bytes=3e9,
    spills=4,
    vmem_bytes=2**20,
  )
  good["unit_cycles"] = dict(MXU=1.5e6, VALU=1e6, EUP=2e5, XLU=0, VLOAD=9e5, VSTORE=1.9e6, HBM=3e5)
  bad = dict(name="b", shape="s", chip="v6e", error="ValueError: too large")
  lines = table([good, bad]).splitlines()
  assert "80.0%" in lines[2] and "1.70" in lines[2] and "too large" in lines[3]
  assert "1.50" in lines[2] and "a: stays in hbm." in closing([good, bad])
  units = unit_table([good, bad])
  assert units.endswith(
    "| a | v5e | 1.500 | 1.000 | 0.200 | 0.000 | 0.900 | 1.900 | 0.300 | 2.000 | 75% |"
  )
  assert "80% of peak" in chart([good, bad]) and "v6e" not in chart([good, bad])


def test_a_case_that_cannot_compile_is_a_row_with_its_error(monkeypatch):
  from pallas_kernels.schedule import report as module
  from pallas_kernels.schedule.case import Case

  def fails(*args, **options):
    raise NotImplementedError("not here\nsecond line")

  monkeypatch.setattr(module, "analyse", fails)
  found = row(Case(name="x", shape="", fn=product, args=SHAPES, flops=1.0), "v5e")
  assert found["error"] == "NotImplementedError: not here"
