"""Extreme logits, NaN, inf, ignored rows, wrong labels: nothing overflows, leaks or is hidden."""

# N tokens, D model, V vocabulary
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import linear_cross_entropy

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
# JAX's own gradient of the reference loses digits.
EXACT = ("xla", "pallas_tpu")
N, D, V = 8, 4, 150


@functools.cache
def differentiated(implementation, reduction, **options):
  def loss(e_ND, c_VD, bias_V, labels_N):
    loss_N = linear_cross_entropy(
      e_ND,
      c_VD,
      labels_N,
      bias_V=bias_V,
      reduction=reduction,
      implementation=implementation,
      interpret="pallas" in implementation,
      **options,
    )
    return jnp.sum(loss_N), loss_N

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def inputs(scale=1.0):
  rng = np.random.default_rng(0)
  e_ND, c_VD = jnp.float32(rng.normal(size=(N, D))), jnp.float32(scale * rng.normal(size=(V, D)))
  return e_ND, c_VD, jnp.zeros(V), jnp.asarray(rng.integers(0, V, N), jnp.int32)


def run(implementation, e_ND, c_VD, bias_V, labels_N, reduction="none", **options):
  (_, loss), gradients = differentiated(implementation, reduction, **options)(
    e_ND, c_VD, bias_V, labels_N
  )
  return np.asarray(loss), [np.asarray(g) for g in gradients]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_logits(implementation):
  e_ND, _, bias_V, labels_N = inputs()
  loss_N, (_, dc_VD, db_V) = run(implementation, e_ND, jnp.zeros((V, D)), bias_V, labels_N)
  np.testing.assert_allclose(loss_N, np.log(V), rtol=1e-6)
  np.testing.assert_allclose(db_V, N / V - np.bincount(labels_N, minlength=V), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e30])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_logits_do_not_overflow(implementation, scale):
  e_ND, c_VD, bias_V, labels_N = inputs(scale)
  loss_N, gradients = run(implementation, e_ND, c_VD, bias_V, labels_N)
  x_NV = np.float64(e_ND) @ np.float64(c_VD).T
  want_N = x_NV.max(axis=1) - x_NV[np.arange(N), labels_N]
  np.testing.assert_allclose(loss_N, want_N, rtol=1e-5)
  assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("miss", [1e-3, 1e-6, 1e-7])
def test_gradient_of_a_confident_row_keeps_its_digits(implementation, dtype, miss):
  # The target's logit is 0, every other is t: 1 - p is about (V - 1) exp(t).
  t = float(jnp.asarray(np.log(miss / (V - 1)) / D, dtype)) * D
  c_VD = jnp.full((V, D), t / D, dtype).at[5].set(0)
  rest = (V - 1) * np.exp(t)
  labels_N = jnp.full(N, 5, jnp.int32)
  for reduction in ("none", "sum"):
    _, (_, _, db_V) = run(
      implementation, jnp.ones((N, D), dtype), c_VD, jnp.zeros(V), labels_N, reduction
    )
    assert abs(db_V[5] / N + rest / (1 + rest)) < 1e-6
    np.testing.assert_allclose(db_V[6] / N, rest / (1 + rest) / (V - 1), rtol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saturated_softcap_has_no_gradient(implementation):
  e_ND, c_VD, bias_V, labels_N = inputs(1e4)
  c_VD = jnp.where(jnp.abs(c_VD) < 5e3, 5e3, c_VD)
  e_ND = jnp.abs(e_ND[:, :1]) * jnp.eye(1, D) + jnp.eye(1, D)
  loss_N, gradients = run(implementation, e_ND, c_VD, bias_V, labels_N, softcap=30.0)
  assert np.isfinite(loss_N).all()
  assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_ignored(implementation, reduction):
  e_ND, c_VD, bias_V, _ = inputs()
  loss, gradients = run(implementation, e_ND, c_VD, bias_V, jnp.full(N, -100, jnp.int32), reduction)
  assert not loss.any() and all(not g.any() for g in gradients)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_in_an_ignored_row_reaches_nothing(implementation, reduction, bad):
  e_ND, c_VD, bias_V, labels_N = inputs()
  labels_N = labels_N.at[2].set(-100)
  clean = run(implementation, e_ND.at[2].set(0), c_VD, bias_V, labels_N, reduction)
  dirty = run(implementation, e_ND.at[2].set(bad), c_VD, bias_V, labels_N, reduction)
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_weight_0_reaches_no_gradient_though_its_lse_is_returned(implementation):
  e_ND, c_VD, bias_V, labels_N = inputs()
  weights_N = np.float32(np.arange(N) != 2)

  def loss(e_ND, c_VD):
    loss, lse_N = linear_cross_entropy(
      e_ND,
      c_VD,
      labels_N,
      weights_N=weights_N,
      return_lse=True,
      implementation=implementation,
      interpret="pallas" in implementation,
    )
    return loss, lse_N

  gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  gradients, lse_N = gradients(e_ND.at[2].set(jnp.nan), c_VD)
  assert np.isnan(lse_N[2]) and np.isfinite(np.delete(lse_N, 2)).all()
  assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_in_a_row_reaches_its_loss_its_gradient_and_the_classifier(implementation, bad):
  e_ND, c_VD, bias_V, labels_N = inputs()
  loss_N, (de_ND, dc_VD, _) = run(implementation, e_ND.at[2, 1].set(bad), c_VD, bias_V, labels_N)
  assert not np.isfinite(loss_N[2]) and np.isfinite(np.delete(loss_N, 2)).all()
  assert np.isnan(de_ND[2]).any() and np.isfinite(np.delete(de_ND, 2, axis=0)).all()
  assert np.isnan(dc_VD[:, 1]).all()
  if np.isnan(bad):
    assert np.isnan(dc_VD).all()


@pytest.mark.parametrize("implementation", EXACT)
def test_filters_do_not_hide_nan(implementation):
  e_ND, c_VD, bias_V, labels_N = inputs()
  _, (_, dc_VD, _) = run(
    implementation, e_ND.at[2].set(jnp.nan), c_VD, bias_V, labels_N, filter_e=10.0, filter_c=10.0
  )
  assert np.isnan(dc_VD).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_entries_and_fully_masked_rows(implementation):
  e_ND, c_VD, bias_V, _ = inputs()
  labels_N = jnp.full(N, 149, jnp.int32)
  _, (_, dc_VD, db_V) = run(implementation, e_ND, c_VD, bias_V.at[:140].set(-jnp.inf), labels_N)
  assert (
    not dc_VD[:140].any()
    and not db_V[:140].any()
    and np.isfinite(dc_VD).all()
    and dc_VD[140:].any()
  )
  if implementation != "reference":  # the gradient of logsumexp at -inf is NaN in JAX itself
    loss_N, gradients = run(implementation, e_ND, c_VD, bias_V - jnp.inf, labels_N)
    assert not loss_N.any() and all(not g.any() for g in gradients)


@pytest.mark.parametrize("label", [V, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_wrong_label(implementation, label):
  e_ND, c_VD, bias_V, labels_N = inputs()
  labels_N = labels_N.at[2].set(label)
  loss_N, (de_ND, dc_VD, _) = run(implementation, e_ND, c_VD, bias_V, labels_N)
  assert np.isnan(loss_N[2]) and np.isfinite(np.delete(loss_N, 2)).all()
  assert np.isfinite(np.delete(de_ND, 2, axis=0)).all()
  loss, _ = run(implementation, e_ND, c_VD, bias_V, labels_N, "mean")
  assert np.isnan(loss)
  with pytest.raises(ValueError, match=rf"labels_N=\[\s*{label}\]: labels lie in \[0, {V}\)"):
    linear_cross_entropy(e_ND, c_VD, labels_N)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(reduction):
  _, c_VD, _, _ = inputs()
  loss, dc_VD = jax.value_and_grad(
    lambda c_VD: jnp.sum(
      linear_cross_entropy(jnp.zeros((0, D)), c_VD, jnp.zeros(0, jnp.int32), reduction=reduction)
    )
  )(c_VD)
  assert loss == 0 and not dc_VD.any()
  shape = linear_cross_entropy(
    jnp.zeros((0, D)), c_VD, jnp.zeros(0, jnp.int32), reduction=reduction
  ).shape
  assert shape == ((0,) if reduction == "none" else ())


def test_float16_gradients_of_a_mean_do_not_underflow():
  rng = np.random.default_rng(0)
  e_ND, c_VD = jnp.float16(rng.normal(size=(600, 8))), jnp.float16(rng.normal(size=(300, 8)))
  labels_N = jnp.asarray(rng.integers(0, 300, 600), jnp.int32)

  def loss(e_ND, c_VD, **options):
    loss_N, _ = linear_cross_entropy(
      e_ND, c_VD, labels_N, reduction="none", return_lse=True, **options
    )
    return jnp.mean(loss_N) / 64

  gradients = jax.jit(jax.grad(loss, (0, 1)), static_argnames="implementation")
  got = gradients(e_ND, c_VD, implementation="xla")
  want = gradients(jnp.float32(e_ND), jnp.float32(c_VD), implementation="reference")
  assert got[1].dtype == jnp.float16
  assert np.linalg.norm(np.float32(got[1]) - want[1]) < 3e-3 * np.linalg.norm(want[1])


def test_float16_logits_beyond_its_range_stay_finite():
  e_ND, c_VD = jnp.full((4, 4), 300, jnp.float16), jnp.full((150, 4), 300, jnp.float16)
  differentiate = jax.jit(jax.value_and_grad(linear_cross_entropy))
  loss, gradient = differentiate(e_ND, c_VD, jnp.zeros(4, jnp.int32))
  np.testing.assert_allclose(
    loss, np.log(150), atol=0.04
  )  # float32 numbers near 360000 are 0.03 apart
  assert np.isfinite(gradient).all()
