"""Schedules of real kernels, compiled ahead of time, against cycles and bytes counted by hand."""

# M, K, N sizes of a matrix product
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.chips import CHIPS, CORES
from pallas_kernels.schedule import analyse
from pallas_kernels.schedule.report import chart, closing, report, row, table
from pallas_kernels.schedule.traffic import pallas_calls

pytest.importorskip("libtpu")


def matmul_kernel(a, b, out):
  out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)


def product(a_MK, b_KN, tile=512):
  """A whole K in every tile: nothing but matmuls, and the additions of their partial results."""
  (M, K), N = a_MK.shape, b_KN.shape[1]
  return pl.pallas_call(
    matmul_kernel,
    grid=(M // tile, N // tile),
    in_specs=[
      pl.BlockSpec((tile, K), lambda i, j: (i, 0)),
      pl.BlockSpec((K, tile), lambda i, j: (0, j)),
    ],
    out_specs=pl.BlockSpec((tile, tile), lambda i, j: (i, j)),
    out_shape=jax.ShapeDtypeStruct((M, N), jnp.float32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    name="product",
  )(a_MK, b_KN)


SHAPES = (
  jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16),
  jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16),
)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_cycles_of_a_product_on_128_wide_mxus(chip):
  """4 MXUs of 128 x 128, one row a cycle: M K N / 65536 cycles, shared by the cores."""
  (found,) = analyse(product, SHAPES, chip)
  by_hand = 4096 * 2048 * 4096 / (4 * 128 * 128) / CORES[chip].count
  assert found.cycles == pytest.approx(by_hand, rel=0.05)
  assert found.flops == 2 * 4096 * 2048 * 4096
  assert found.operands == "bf16" and found.mxu_use > 0.95


@pytest.mark.slow
def test_bytes_of_a_product():
  (found,) = analyse(product, SHAPES, "v5e")
  left_once, right_8_times, out = 4096 * 2048 * 2, 8 * 2048 * 4096 * 2, 4096 * 4096 * 4
  assert found.hbm_bytes == left_once + right_8_times + out
  assert found.hbm_us == pytest.approx(found.hbm_bytes / CHIPS["v5e"].hbm_bytes_per_s * 1e6)


@pytest.mark.slow
def test_cycles_of_an_elementwise_kernel():
  """256 registers of 8 x 128 floats a step take 256 cycles of the one store slot.

  The pipeline adds fewer than 64.
  """

  def double(x, out):
    out[...] = 2 * x[...]

  fn = pl.pallas_call(
    double,
    grid=(8,),
    in_specs=[pl.BlockSpec((256, 1024), lambda i: (i, 0))],
    out_specs=pl.BlockSpec((256, 1024), lambda i: (i, 0)),
    out_shape=jax.ShapeDtypeStruct((2048, 1024), jnp.float32),
  )
  (found,) = analyse(fn, (jax.ShapeDtypeStruct((2048, 1024), jnp.float32),), "v5e")
  assert found.operands == "none" and found.mxu_use == 0
  print("CYC", found.step_cycles, found.cycles)
  assert found.step_cycles == pytest.approx(256 * 1024 / 1024, rel=0.3)
  assert found.us == max(found.core_us, found.hbm_us, found.copy_us) == found.hbm_us


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
  bad = dict(name="b", shape="s", chip="v6e", error="ValueError: too large")
  lines = table([good, bad]).splitlines()
  assert "80.0%" in lines[2] and "1.70" in lines[2] and "too large" in lines[3]
  assert "1.50" in lines[2] and "a: stays in hbm." in closing([good, bad])
  assert "80% of peak" in chart([good, bad]) and "v6e" not in chart([good, bad])


def test_a_case_that_cannot_compile_is_a_row_with_its_error():
  from pallas_kernels.schedule.cases import Case

  def fails(*args):
    raise NotImplementedError("not here\nsecond line")

  found = row(Case(name="x", shape="", fn=fails, args=SHAPES, flops=1.0), "v5e")
  assert found["error"] == "NotImplementedError: not here"
