"""Attention on a GPU: cuDNN and the blocked form against the reference, forward and gradients."""

# B batch, T positions, N query heads, K key heads, H head width
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
CASES = {
  "plain": dict(),
  "window": dict(window=100),
  "segments": dict(segments=True),
  "cap": dict(cap=20.0),
  "cap, window and segments": dict(cap=20.0, window=100, segments=True),
}


def value_and_gradients(implementation, dtype, segments=False, T=512, **options):
  """Output [B, T, N, H] and the gradients of queries, keys and values."""
  B, N, K, H = 2, 8, 2, 64
  keys = jax.random.split(jax.random.key(0), 4)
  q_BTNH, k_BTKH, v_BTKH = (
    jax.random.normal(key, (B, T, heads, H)).astype(dtype) for key, heads in zip(keys, (N, K, K))
  )
  weights_BTNH = jax.random.normal(keys[3], (B, T, N, H))
  ids_BT = jnp.broadcast_to(jnp.arange(T) // 150, (B, T)) if segments else None

  def loss(q_BTNH, k_BTKH, v_BTKH):
    o_BTNH = attention(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      q_segment_ids_BT=ids_BT,
      k_segment_ids_BS=ids_BT,
      implementation=implementation,
      **options,
    )
    return jnp.sum(weights_BTNH * o_BTNH.astype(jnp.float32)), o_BTNH

  (_, o_BTNH), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
    q_BTNH, k_BTKH, v_BTKH
  )
  return o_BTNH, *gradients


def assert_close(got, want, tolerance):
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  for ours, theirs in zip(got, want):
    ours, theirs = np.float64(ours), np.float64(theirs)
    assert np.linalg.norm(ours - theirs) < tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 8e-3), ("float32", 5e-3)])
def test_blocked_form(name, dtype, tolerance):
  got = value_and_gradients("xla", dtype, **CASES[name])
  assert_close(got, value_and_gradients("reference", dtype, **CASES[name]), tolerance)


@pytest.mark.parametrize("name", ["plain", "window", "segments"])
def test_cudnn(name):
  got = value_and_gradients("cudnn", "bfloat16", **CASES[name])
  assert_close(got, value_and_gradients("reference", "bfloat16", **CASES[name]), 8e-3)


@pytest.mark.parametrize("name", CASES)
def test_what_is_chosen_honours_every_option(name):
  got = value_and_gradients(None, "bfloat16", **CASES[name])
  assert_close(got, value_and_gradients("reference", "bfloat16", **CASES[name]), 8e-3)
