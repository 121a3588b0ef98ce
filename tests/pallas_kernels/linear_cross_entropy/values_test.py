"""Every implementation against float64 arithmetic written out here, forward and each gradient."""

# N tokens, D model, V vocabulary
import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import linear_cross_entropy, pallas_tpu, terms, xla

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

SEED = secrets.randbits(32)  # new inputs every run; a failure prints it
IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")


def call(implementation, *args, **options):
  return linear_cross_entropy(
    *args, implementation=implementation, interpret="pallas" in implementation, **options
  )


def problem(N, D, V, dtype=jnp.float32, scale=1.0, seed=None):
  """Embeddings, classifier, labels and bias; a float64 oracle sees them rounded to dtype too."""
  rng = np.random.default_rng(SEED if seed is None else seed)
  e_ND = jnp.asarray(scale * rng.normal(size=(N, D)), dtype)
  c_VD = jnp.asarray(rng.normal(size=(V, D)) / np.sqrt(D), dtype)
  return (
    e_ND,
    c_VD,
    jnp.asarray(rng.integers(0, V, N), jnp.int32),
    jnp.asarray(rng.normal(size=V), jnp.float32),
  )


def oracle(
  e_ND,
  c_VD,
  labels_N,
  bias_V,
  ct_loss_N,
  ct_lse_N,
  *,
  softcap,
  temperature,
  label_smoothing,
  z_loss,
):
  """Loss, lse and gradients of sum(ct_loss * loss + ct_lse * lse), written out in float64."""
  e_ND, c_VD, bias_V = (np.asarray(a, np.float64) for a in (e_ND, c_VD, bias_V))
  labels_N = np.asarray(labels_N)
  V = len(c_VD)
  u_NV = (e_ND @ c_VD.T + bias_V) / temperature
  x_NV = u_NV if softcap is None else softcap * np.tanh(u_NV / softcap)
  top_N = x_NV.max(axis=1)
  lse_N = top_N + np.log(np.exp(x_NV - top_N[:, None]).sum(axis=1))
  counted_N = labels_N >= 0
  onehot_NV = np.eye(V)[np.where(counted_N, labels_N, 0)]
  target_N = (x_NV * onehot_NV).sum(axis=1)
  loss_N = (
    lse_N
    - (1 - label_smoothing) * target_N
    - label_smoothing / V * x_NV.sum(axis=1)
    + z_loss * lse_N**2
  )
  p_NV = np.exp(x_NV - lse_N[:, None])
  g_NV = (
    p_NV * (1 + 2 * z_loss * lse_N)[:, None]
    - label_smoothing / V
    - (1 - label_smoothing) * onehot_NV
  )
  g_NV = (ct_loss_N * counted_N)[:, None] * g_NV + ct_lse_N[:, None] * p_NV
  g_NV *= (1 if softcap is None else 1 - (x_NV / softcap) ** 2) / temperature
  return np.where(counted_N, loss_N, 0), lse_N, (g_NV @ c_VD, g_NV.T @ e_ND, g_NV.sum(axis=0))


def relative(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


@functools.cache
def differentiated(implementation, layout, **options):
  """One compiled function for each set of options: loss, lse and the three gradients."""

  def combined(e_ND, c, bias_V, labels_N, ct_loss_N, ct_lse_N):
    loss_N, lse_N = call(
      implementation,
      e_ND,
      c,
      labels_N,
      bias_V=bias_V,
      reduction="none",
      return_lse=True,
      classifier_layout=layout,
      **options,
    )
    return jnp.sum(ct_loss_N * loss_N + ct_lse_N * lse_N), (loss_N, lse_N)

  return jax.jit(jax.value_and_grad(combined, (0, 1, 2), has_aux=True))


PLAIN = dict(softcap=None, temperature=1.0, label_smoothing=0.0, z_loss=0.0)
ALL = dict(softcap=4.0, temperature=0.7, label_smoothing=0.1, z_loss=0.01)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["vd", "dv"])
@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all options"])
def test_every_option_matches_float64(implementation, layout, options):
  # 150 rows and 301 entries are no multiple of any tile.
  e_ND, c_VD, labels_N, bias_V = problem(150, 24, 301)
  labels_N = labels_N.at[jnp.asarray([0, 7, 149])].set(jnp.asarray([0, -100, 300]))
  ct_loss_N, ct_lse_N = np.random.default_rng(1).normal(size=(2, 150))
  loss_N, lse_N, gradients = oracle(e_ND, c_VD, labels_N, bias_V, ct_loss_N, ct_lse_N, **options)
  c = c_VD if layout == "vd" else c_VD.T
  function = differentiated(implementation, layout, **options)
  (_, (got_loss_N, got_lse_N)), (de, dc, db) = function(
    e_ND, c, bias_V, labels_N, ct_loss_N, ct_lse_N
  )
  assert relative(got_loss_N, loss_N) < 1e-6, SEED
  assert relative(got_lse_N, lse_N) < 1e-6, SEED
  for got, want in zip((de, dc if layout == "vd" else dc.T, db), gradients):
    assert relative(got, want) < 1e-5, SEED
  assert got_loss_N[7] == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
  e_ND, c_VD, labels_N, bias_V = problem(150, 24, 301, jnp.bfloat16)
  ones_N, zeros_N = np.ones(150), np.zeros(150)
  loss_N, _, gradients = oracle(e_ND, c_VD, labels_N, bias_V, ones_N, zeros_N, **PLAIN)
  function = differentiated(implementation, "vd", **PLAIN)
  (_, (got_N, _)), got = function(
    e_ND, c_VD, bias_V, labels_N, jnp.float32(ones_N), jnp.float32(zeros_N)
  )
  assert got[0].dtype == got[1].dtype == jnp.bfloat16 and got_N.dtype == got[2].dtype == jnp.float32
  assert abs(np.mean(got_N) / np.mean(loss_N) - 1) < 1e-6, SEED
  assert all(relative(g, want) < 2.5e-3 for g, want in zip(got, gradients)), SEED


@pytest.mark.parametrize(
  "implementation", [pytest.param("xla", marks=pytest.mark.slow), "pallas_tpu"]
)
def test_gradients_of_bfloat16_before_their_last_rounding(implementation):
  # The target's entry p - 1 is rounded too; with many entries p is small and that nearly exact.
  e_ND, c_VD, labels_N, bias_V = problem(150, 24, 8001, jnp.bfloat16)
  _, _, want = oracle(e_ND, c_VD, labels_N, bias_V, np.ones(150), np.zeros(150), **PLAIN)
  inputs = terms.Inputs(e_ND, c_VD, labels_N, bias_V)
  options = terms.Options(vocabulary=8001, interpret=implementation == "pallas_tpu")
  backend = {"xla": xla, "pallas_tpu": pallas_tpu}[implementation]

  @jax.jit
  def gradients(inputs):
    one_N = jnp.ones(150)
    cotangents = terms.Statistics(one_N, -one_N, 0 * one_N)
    factors = terms.row_factors(backend.statistics(inputs, options), cotangents)
    return backend.gradients(inputs, factors, options)

  de_ND, dc_VD, _ = gradients(inputs)
  assert de_ND.dtype == dc_VD.dtype == jnp.float32
  assert relative(de_ND, want[0]) < 5e-4 and relative(dc_VD, want[1]) < 5e-4, SEED


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float64(implementation):
  with jax.enable_x64(True):
    rng = np.random.default_rng(SEED)
    e_ND, c_VD, bias_V = (jnp.asarray(rng.normal(size=shape)) for shape in ((9, 5), (11, 5), (11,)))
    labels_N = jnp.asarray(rng.integers(0, 11, 9))
    weights = np.ones(9), np.zeros(9)
    loss_N, lse_N, gradients = oracle(e_ND, c_VD, labels_N, bias_V, *weights, **ALL)
    function = differentiated(implementation, "vd", **ALL)
    (_, got), got_gradients = function(e_ND, c_VD, bias_V, labels_N, *weights)
    for a, b in zip((*got, *got_gradients), (loss_N, lse_N, *gradients)):
      assert a.dtype == jnp.float64 and relative(a, b) < 1e-13


@pytest.mark.parametrize(
  "options",
  [pytest.param(PLAIN, id="plain", marks=pytest.mark.slow), pytest.param(ALL, id="all options")],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_scalar_reductions(implementation, reduction, options):
  """xla makes these gradients in its forward pass; 5000 entries are no small vocabulary."""
  V = 5000 if implementation == "xla" else 301
  e_ND, c_VD, labels_N, bias_V = problem(150, 8, V)
  labels_N = labels_N.at[3].set(-100)
  share = 3.0 / (149 if reduction == "mean" else 1)
  loss_N, _, want = oracle(
    e_ND, c_VD, labels_N, bias_V, share * np.ones(150), np.zeros(150), **options
  )

  def scaled(e_ND, c_VD, bias_V):
    return 3.0 * call(
      implementation, e_ND, c_VD, labels_N, bias_V=bias_V, reduction=reduction, **options
    )

  loss, got = jax.jit(jax.value_and_grad(scaled, (0, 1, 2)))(e_ND, c_VD, bias_V)
  assert relative(loss, share * loss_N.sum()) < 1e-6
  assert all(relative(g, w) < 1e-5 for g, w in zip(got, want)), SEED
  assert (
    relative(scaled(e_ND, c_VD, bias_V), loss) < 1e-6
  )  # without differentiation and without jit


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 1, 2), (2, 3, 1), (5, 2304, 7)], ids=str)
def test_small_and_odd_sizes(implementation, shape):
  e_ND, c_VD, labels_N, bias_V = problem(*shape)
  ones_N, zeros_N = np.ones(shape[0]), np.zeros(shape[0])
  loss_N, _, want = oracle(e_ND, c_VD, labels_N, bias_V, ones_N, zeros_N, **PLAIN)
  function = differentiated(implementation, "vd", **PLAIN)
  (_, (got_N, _)), got = function(
    e_ND, c_VD, bias_V, labels_N, jnp.float32(ones_N), jnp.float32(zeros_N)
  )
  np.testing.assert_allclose(got_N, loss_N, rtol=1e-6, atol=1e-6)
  for g, w in zip(got, want):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
  if shape[2] == 1:
    assert not np.any(got_N) and all(not np.any(g) for g in got)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_same_bits_twice_and_with_permuted_vocabulary(implementation):
  e_ND, c_VD, labels_N, bias_V = problem(150, 24, 301)
  ones_N, zeros_N = jnp.ones(150), jnp.zeros(150)
  function = differentiated(implementation, "vd", **PLAIN)
  first = function(e_ND, c_VD, bias_V, labels_N, ones_N, zeros_N)
  again = function(e_ND, c_VD, bias_V, labels_N, ones_N, zeros_N)
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again)))
  order_V = np.random.default_rng(SEED).permutation(301)
  place_V = jnp.asarray(np.argsort(order_V), jnp.int32)
  (moved, _), (de, dc, _) = function(
    e_ND, c_VD[order_V], bias_V[order_V], place_V[labels_N], ones_N, zeros_N
  )
  assert relative(moved, first[0][0]) < 1e-6
  assert relative(de, first[1][0]) < 1e-5 and relative(dc, first[1][1][order_V]) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_duplicate_rows_have_the_same_loss_and_gradient(implementation):
  e_ND, c_VD, labels_N, bias_V = problem(150, 24, 301)
  e_ND, labels_N = e_ND.at[100].set(e_ND[2]), labels_N.at[100].set(labels_N[2])
  function = differentiated(implementation, "vd", **PLAIN)
  (_, (loss_N, _)), (de_ND, _, _) = function(
    e_ND, c_VD, bias_V, labels_N, jnp.ones(150), jnp.zeros(150)
  )
  np.testing.assert_allclose(loss_N[100], loss_N[2], rtol=1e-6)
  np.testing.assert_allclose(de_ND[100], de_ND[2], rtol=1e-5, atol=1e-6)


def test_vmap():
  e_ND, c_VD, labels_N, _ = problem(12, 4, 20)
  batched = jax.jit(jax.vmap(lambda e, c, y: call("xla", e, c, y), (0, None, 0)))
  got = batched(e_ND.reshape(3, 4, 4), c_VD, labels_N.reshape(3, 4))
  single = jax.jit(functools.partial(call, "reference"))
  want = [single(e_ND[i : i + 4], c_VD, labels_N[i : i + 4]) for i in (0, 4, 8)]
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_of_tokens_and_a_gradient_through_lse(implementation, reduction):
  e_ND, c_VD, labels_N, bias_V = problem(150, 8, 301)
  weights_N = np.random.default_rng(SEED).uniform(-0.5, 2, 150).astype(np.float32)
  weights_N[5] = (
    0  # like an ignored token: its NaN reaches nothing but its lse, which is left alone here
  )
  labels_N = labels_N.at[3].set(-100)
  counted_N = weights_N * (np.arange(150) != 3)
  share_N = counted_N / (counted_N.sum() if reduction == "mean" else 1)
  shown_N = (np.arange(150) != 5).astype(np.float32)
  want_loss_N, _, want = oracle(e_ND, c_VD, labels_N, bias_V, share_N, 0.3 * shown_N, **ALL)
  if implementation != "reference":  # whose gradient is JAX's own: 0 times NaN
    e_ND = e_ND.at[5].set(jnp.nan)

  def total(e_ND, c_VD, bias_V):
    options = dict(
      bias_V=bias_V, weights_N=jnp.asarray(weights_N), reduction=reduction, return_lse=True
    )
    loss, lse_N = call(implementation, e_ND, c_VD, labels_N, **options, **ALL)
    return jnp.sum(loss) + 0.3 * jnp.sum(jnp.where(shown_N > 0, lse_N, 0)), jnp.sum(loss)

  (_, loss), got = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(e_ND, c_VD, bias_V)
  np.testing.assert_allclose(loss, (share_N * want_loss_N).sum(), rtol=1e-5, atol=1e-5)
  for g, w in zip(got, want):
    assert relative(g, w) < 1e-5, SEED
