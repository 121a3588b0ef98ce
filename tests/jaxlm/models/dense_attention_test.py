import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.models import dense_attention
from jaxlm.models.attention import dense
from jaxlm.models.blocked_attention import blocked

# T, query heads, key heads, window, packed
CASES = {
  "one position": (1, 2, 2, None, False),
  "odd": (73, 2, 2, None, False),
  "grouped": (130, 4, 2, None, False),
  "one key head, narrow window": (65, 3, 1, 3, False),
  "wide window": (130, 2, 2, 70, False),
  "packed": (130, 4, 2, None, True),
  "packed, window": (97, 4, 2, 5, True),
}


def inputs(T, N, K, H=8, B=2, dtype=np.float32):
  draw = np.random.default_rng(T)
  return [draw.normal(size=(B, T, heads, H)).astype(dtype) for heads in (N, K, K, N)]


def segments(T, B=2):
  """Rows cut at different places, the last part padding (segment 0)."""
  cuts = np.zeros((B, T), np.int32)
  for b in range(B):
    for segment, (start, stop) in enumerate(
      [(0, T // 3 + b), (T // 3 + b, 2 * T // 3), (2 * T // 3, T - 2)], start=1
    ):
      cuts[b, start:stop] = segment
  return cuts


def assert_close(got, want, tolerance=1e-6):
  """Within `tolerance` of each array's largest entry."""
  assert len(got) == len(want)
  for name, got_x, want_x in zip("oqkv", got, want):
    limit = tolerance * np.abs(want_x).max()
    np.testing.assert_allclose(
      got_x, want_x, rtol=0, atol=limit, err_msg=f"output or gradient to {name}"
    )


def library(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=None, window=None):
  same = (
    None
    if segment_ids_BT is None
    else (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
  )
  left = None if window is None else (window - 1, 0)
  return jax.nn.dot_product_attention(
    q_BTNH, k_BTKH, v_BTKH, mask=same, is_causal=True, local_window_size=left
  )


@functools.partial(jax.jit, static_argnums=(0, 6), static_argnames="cap")
def output_and_gradients(attend, q_BTNH, k_BTKH, v_BTKH, out_BTNH, segment_ids_BT, window, **cap):
  o_BTNH, pull = jax.vjp(
    lambda q, k, v: attend(q, k, v, segment_ids_BT, window, **cap), q_BTNH, k_BTKH, v_BTKH
  )
  return o_BTNH, *pull(out_BTNH)


@pytest.mark.parametrize("case", CASES)
def test_blocked_reference_and_library_agree_with_gradients(case):
  T, N, K, window, packed = CASES[case]
  arguments = (*inputs(T, N, K), segments(T) if packed else None, window)
  want = output_and_gradients(library, *arguments)
  for attend in (dense_attention.reference, blocked):
    assert_close(output_and_gradients(attend, *arguments), want)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cap, size", [(2.0, 3), (None, 100)], ids=["soft cap", "large logits"])
def test_blocked_is_the_reference_under_a_soft_cap_and_with_large_logits(case, cap, size):
  T, N, K, window, packed = CASES[case]
  q_BTNH, k_BTKH, v_BTKH, out_BTNH = inputs(T, N, K)
  arguments = (size * q_BTNH, k_BTKH, v_BTKH, out_BTNH, segments(T) if packed else None, window)
  want = output_and_gradients(dense_attention.reference, *arguments, cap=cap)
  assert_close(output_and_gradients(blocked, *arguments, cap=cap), want, 1e-6 * size)


def test_many_blocks_of_more_than_64_rows_agree():
  """Above 1024 positions the blocks grow."""
  q_BTNH, k_BTKH, v_BTKH, _ = inputs(1100, 1, 1, B=1)
  got, want = (
    jax.jit(functools.partial(attend, window=300))(q_BTNH, k_BTKH, v_BTKH)
    for attend in (blocked, dense_attention.reference)
  )
  assert_close([got], [want])


@pytest.mark.parametrize("window", [None, 40])
def test_the_larger_blocks_of_wide_heads_agree_with_gradients(window):
  arguments = (*inputs(280, 2, 1, H=64, B=1), None, window)
  want = output_and_gradients(dense_attention.reference, *arguments)
  # sums this long: beside float64 the reference itself is 1.2e-6 off, the blocks 0.7e-6
  assert_close(output_and_gradients(blocked, *arguments), want, 2e-6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("attend", [dense_attention.reference, blocked], ids=lambda f: f.__name__)
def test_gradient_to_later_keys_and_values_is_exactly_zero(attend, window):
  T, t = 80, 66
  q_BTNH, k_BTKH, v_BTKH, out_BTNH = inputs(T, 2, 1)
  only_t = np.where((np.arange(T) == t)[None, :, None, None], out_BTNH, 0)
  _, dq_BTNH, dk_BTKH, dv_BTKH = output_and_gradients(
    attend, q_BTNH, k_BTKH, v_BTKH, only_t, None, window
  )
  first = 0 if window is None else t - window + 1
  for gradient in (dk_BTKH, dv_BTKH):
    reached_T = np.any(np.asarray(gradient) != 0, axis=(0, 2, 3))
    assert reached_T.tolist() == [first <= s <= t for s in range(T)]
  assert np.flatnonzero(np.any(np.asarray(dq_BTNH) != 0, axis=(0, 2, 3))).tolist() == [t]


@pytest.mark.parametrize("attend", [dense_attention.reference, blocked], ids=lambda f: f.__name__)
def test_bfloat16_keeps_its_dtype_and_large_logits_stay_finite(attend):
  q_BTNH, k_BTKH, v_BTKH, _ = inputs(70, 2, 1, dtype=ml_dtypes.bfloat16)
  got = jax.jit(attend)(q_BTNH, k_BTKH, v_BTKH)
  assert got.dtype == jnp.bfloat16
  want = jax.jit(attend)(*(x.astype(np.float32) for x in (q_BTNH, k_BTKH, v_BTKH)))
  np.testing.assert_allclose(got.astype(np.float32), want, atol=2e-2)
  huge = jax.jit(attend)(q_BTNH * 1e4, k_BTKH * 1e4, v_BTKH)
  assert np.isfinite(huge.astype(np.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
  "N, K, window, packed", [(2, 2, None, False), (4, 2, None, True), (2, 1, 100, True)]
)
def test_splash_interpreted_equals_reference(N, K, window, packed):
  T = 256
  arguments = (*inputs(T, N, K, H=16, B=2), segments(T) if packed else None, window)
  splash = functools.partial(dense_attention.splash, interpret=True)
  want = output_and_gradients(dense_attention.reference, *arguments)
  assert_close(output_and_gradients(splash, *arguments), want, 2e-5)


def test_splash_refuses_a_length_that_is_no_multiple_of_128():
  with pytest.raises(NotImplementedError, match="T=130 must be a multiple of 128"):
    dense_attention.splash(*inputs(130, 2, 2)[:3])


def test_a_named_implementation_runs_or_raises():
  q_BTNH, k_BTKH, v_BTKH, _ = inputs(70, 2, 2)

  def attend(implementation):
    return jax.jit(functools.partial(dense, implementation=implementation))(q_BTNH, k_BTKH, v_BTKH)

  assert_close([attend("auto")], [attend("reference")])
  with pytest.raises(NotImplementedError, match="T=70"):
    attend("splash")
  with pytest.raises(
    (ValueError, RuntimeError), match="(?i)cudnn"
  ):  # the library's words: there is no GPU
    attend("cudnn")
