"""Compiles the TPU kernels ahead of time for four chips."""

# Y[M, N] = X[M, K] W[K, N]
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common.chips import CORES
from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.schedule.compiler import chip_mesh, compile_for

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow
NATIVE = {"v5e": "int8", "v5p": "int8", "v6e": "int8", "tpu7x": "e4m3fn"}
ARGS = (
  jax.ShapeDtypeStruct((1000, 512), jnp.bfloat16),
  jax.ShapeDtypeStruct((512, 384), jnp.float32),
)


def loss(x, w, **options):
  return jnp.sum(fp8_matmul(x, w, **options).astype(jnp.float32))


@pytest.mark.parametrize("chip", CORES)
def test_forward_and_gradients_are_kernels(chip):
  """By default, with the codes that the chip multiplies: three products and six quantisers."""
  gradients = jax.value_and_grad(lambda x, w: loss(x, w, dtype=NATIVE[chip]), (0, 1))
  text = compile_for(gradients, ARGS, chip).as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3 + 6


@pytest.mark.parametrize("chip", CORES)
def test_codes_without_a_matrix_unit_are_refused(chip):
  other = "e4m3fn" if NATIVE[chip] == "int8" else "int8"
  with jax.set_mesh(chip_mesh(chip)), pytest.raises(UnsupportedError, match=f"dtype='{other}'"):
    jax.eval_shape(lambda x, w: fp8_matmul(x, w, dtype=other), *ARGS)
