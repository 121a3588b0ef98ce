"""Memory of attention by blocks: linear in T except where the backward pass on CPU keeps blocks."""

# B batch, T positions, N query heads, K key heads, H head width
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels.attention import attention, blocks


def loss(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
  return jnp.sum(attention(q_BTNH, k_BTKH, v_BTKH, q_segment_ids_BT=segment_ids_BT) ** 2)


def arguments(T):
  shapes = [(1, T, heads, 32) for heads in (2, 1, 1)]
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return *arrays, jax.ShapeDtypeStruct((1, T), jnp.int32)


def temporary_bytes(T):
  function = jax.jit(jax.grad(loss, (0, 1, 2)))
  return function.lower(*arguments(T)).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_compiled_memory_is_linear_in_length():
  shorter, longer = temporary_bytes(8192), temporary_bytes(32768)
  assert longer < 5 * shorter
  assert longer < 32768**2  # bytes: a [T, S] array of bytes does not fit


def largest_array(jaxpr):
  """Returns the number of entries of the largest array in a jaxpr and those inside of it."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [value.aval.size for value in equation.outvars if hasattr(value.aval, "size")]
    sizes += [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
  return max(sizes)


@pytest.mark.parametrize(
  "platform, B, T, N, K, H",
  [("gpu", 8, 4096, 32, 8, 128), ("tpu", 1, 2048, 8, 8, 64), ("cpu", 1, 131072, 8, 8, 64)],
)
def test_no_array_of_queries_times_keys_is_traced(platform, B, T, N, K, H, monkeypatch):
  """At the length of the large presets on GPU, and at a long one also on CPU."""
  q_BTNH, k_BTKH = (jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, K))

  def loss(q, k, v):
    o_BTNH, lse_BTN = attention(q, k, v, return_lse=True, implementation="xla")
    return jnp.sum(o_BTNH.astype(jnp.float32)) + jnp.sum(lse_BTN)

  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q_BTNH, k_BTKH, k_BTKH)
  least = B * N * 16 * T  # logits of the smallest block, where a budget does not suffice for it
  assert largest_array(jaxpr.jaxpr) <= max(blocks.BLOCK_BYTES // 4, least, 2 * q_BTNH.size)
  assert largest_array(jaxpr.jaxpr) <= B * N * T * T / 16


@pytest.mark.parametrize("platform, keeps", [("gpu", False), ("tpu", False), ("cpu", True)])
def test_only_a_cpu_keeps_logits_for_the_backward_pass(platform, keeps, monkeypatch):
  B, T, N, H = 1, 1024, 2, 64
  x_BTNH = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)

  def kept(q, k, v):
    return jax.vjp(lambda *arrays: attention(*arrays, implementation="xla"), q, k, v)[1]

  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  sizes = [x.size for x in jax.tree.leaves(jax.eval_shape(kept, x_BTNH, x_BTNH, x_BTNH))]
  assert (sum(sizes) >= B * N * T * T / 2) == keeps
  assert keeps or sum(sizes) <= 5 * x_BTNH.size  # q, k, v, output, and less
