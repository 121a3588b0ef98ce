"""Gradient filtering and sorting: what is dropped is small, what is kept is exact."""

# N tokens, D model, V vocabulary
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import linear_cross_entropy, terms, xla
from pallas_kernels.linear_cross_entropy.terms import TileSize

BACKENDS = ("xla", "pallas_tpu")
N, D, V = 256, 16, 640
TILE = 128  # rows and entries of every implementation's tiles in this file


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  for name in ("two_pass_tile", "one_pass_tile"):
    monkeypatch.setattr(xla, name, lambda N, V: TileSize(min(N, TILE), min(V, TILE)))


@functools.cache
def peaked(dtype=jnp.bfloat16):
  """Tokens whose probability sits on 64 entries, and those far apart in the vocabulary."""
  rng = np.random.default_rng(0)
  e_ND, c_VD = rng.normal(size=(N, D)), rng.normal(size=(V, D)) / 4
  often_V = rng.permutation(V)[:64]
  e_ND[:, 0], c_VD[:, 0] = 4, -3
  c_VD[often_V, 0] = 3
  labels_N = rng.choice(often_V, N)
  return jnp.asarray(e_ND, dtype), jnp.asarray(c_VD, dtype), jnp.asarray(labels_N, jnp.int32)


def gradients(implementation, reduction="none", arrays=None, **options):
  e_ND, c_VD, labels_N = arrays or peaked()

  def total(e_ND, c_VD):
    interpret = "pallas" in implementation
    returned = linear_cross_entropy(
      e_ND,
      c_VD,
      labels_N,
      reduction=reduction,
      implementation=implementation,
      interpret=interpret,
      **options,
    )
    loss, *rest = returned if isinstance(returned, tuple) else (returned,)
    return jnp.sum(loss), (loss, *rest)

  (_, returned), (de_ND, dc_VD) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
    e_ND, c_VD
  )
  return returned, np.float64(de_ND), np.float64(dc_VD)


def kept_fraction(threshold, arrays, sort=False, z_loss=0.0):
  """Share of the tiles where some |gradient of a logit| reaches `threshold`, in float64."""
  e_ND, c_VD, labels_N = arrays
  order_V = np.arange(V)
  if sort:
    options = terms.Options(vocabulary=V, sort=True, threshold_c=threshold)
    inputs = terms.Inputs(*arrays, None)
    order_V = np.asarray(terms.vocabulary_order(inputs, jnp.ones(N, bool), options))
  x_NV = np.float64(e_ND) @ np.float64(c_VD).T
  top_N1 = x_NV.max(axis=1, keepdims=True)
  lse_N1 = top_N1 + np.log(np.exp(x_NV - top_N1).sum(axis=1, keepdims=True))
  bracket_NV = np.exp(x_NV - lse_N1) * (1 + 2 * z_loss * lse_N1) - np.eye(V)[np.asarray(labels_N)]
  tiles = np.abs(bracket_NV)[:, order_V].reshape(N // TILE, TILE, V // TILE, TILE)
  return (tiles.max(axis=(1, 3)) >= threshold).mean()


def error(got, want):
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("sort", [False, True], ids=["in order", "sorted"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_filtered_gradients_are_close_and_skip_tiles(implementation, sort):
  _, exact_e, exact_c = gradients("reference")
  options = dict(filter_e="auto", filter_c="auto", sort_vocabulary=sort, return_aux=True)
  (loss_N, aux), de_ND, dc_VD = gradients(implementation, **options)
  # the last rounding alone is 1.7e-3
  assert error(de_ND, exact_e) < 5e-3 and error(dc_VD, exact_c) < 2.5e-3
  chex.assert_shape(loss_N, (N,))
  by_hand = kept_fraction(2**-12, peaked(), sort)
  assert by_hand == (0.2 if sort else 1)  # 64 entries share one tile of five only where sorted
  chex.assert_trees_all_close(tuple(aux), (by_hand, by_hand), rtol=1e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_dropped_rows_are_only_small_ones(implementation):
  e_ND, c_VD, labels_N = peaked()
  _, _, dc_VD = gradients(implementation, filter_c="auto", sort_vocabulary=True)
  p_NV = jax.nn.softmax(np.float64(e_ND) @ np.float64(c_VD).T, axis=1)
  largest_V = np.abs(np.asarray(p_NV) - np.eye(V)[labels_N]).max(axis=0)
  zero_V = ~dc_VD.any(axis=1)
  assert zero_V.any() and (largest_V[zero_V] < 2**-12).all()


@pytest.mark.parametrize("implementation", BACKENDS)
def test_thresholds_are_separate(implementation):
  arrays = peaked(jnp.float32)
  _, exact_e, exact_c = gradients(implementation, arrays=arrays)
  _, de_ND, dc_VD = gradients(implementation, arrays=arrays, filter_e=10.0)
  assert not de_ND.any() and np.array_equal(dc_VD, exact_c)
  _, de_ND, dc_VD = gradients(implementation, arrays=arrays, filter_c=10.0)
  assert not dc_VD.any() and np.array_equal(de_ND, exact_e)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_sorting_alone_changes_only_the_order_of_sums(implementation, reduction):
  arrays = peaked(jnp.float32)
  _, exact_e, exact_c = gradients("reference", reduction, arrays)
  (_, aux), de_ND, dc_VD = gradients(
    implementation, reduction, arrays, filter_e=1e-30, sort_vocabulary=True, return_aux=True
  )
  assert error(de_ND, exact_e) < 1e-5 and error(dc_VD, exact_c) < 1e-5
  assert aux.kept_c == 1


def test_aux_shows_that_equal_logits_are_dropped():
  """Where all logits are alike 1 / V is below the threshold: all tiles without a target go."""
  arrays = jnp.zeros((128, 4)), jnp.ones((5120, 4)), jnp.zeros(128, jnp.int32)
  (_, aux), _, dc_VD = gradients(
    "pallas_tpu", arrays=(arrays[0] + 1, *arrays[1:]), filter_c=1e-3, return_aux=True
  )
  assert aux.kept_c == 1 / 40 and aux.kept_e == 1
  assert not dc_VD[128:].any()
  _, _, exact_VD = gradients("pallas_tpu", arrays=(arrays[0] + 1, *arrays[1:]))
  assert np.allclose(exact_VD[128:], 128 / 5120)


def test_the_whole_bracket_is_tested_with_z_loss():
  """The z-loss makes small probabilities matter: 2 z lse p, not p, is compared."""
  arrays = peaked(jnp.float32)
  options = dict(arrays=arrays, filter_c=1e-7, sort_vocabulary=True, return_aux=True)
  plain = gradients("xla", **options)[0][1]
  with_z = gradients("xla", **options, z_loss=1e3)[0][1]
  by_hand = [kept_fraction(1e-7, arrays, True), kept_fraction(1e-7, arrays, True, z_loss=1e3)]
  assert by_hand[0] < by_hand[1]
  chex.assert_trees_all_close([plain.kept_c, with_z.kept_c], by_hand, rtol=1e-6)


@pytest.mark.parametrize("argument", ["filter_e", "filter_c"])
def test_refusals(argument):
  arrays = peaked()
  with pytest.raises(ValueError, match=f"{argument}=.*label_smoothing"):
    linear_cross_entropy(*arrays, label_smoothing=0.1, **{argument: "auto"})
  with pytest.raises(ValueError, match=f"{argument}="):
    linear_cross_entropy(*arrays, **{argument: -1.0})
  with pytest.raises(ValueError, match="sort_vocabulary"):
    linear_cross_entropy(*arrays, sort_vocabulary=True)
  with pytest.raises(NotImplementedError, match="exact"):
    linear_cross_entropy(*arrays, implementation="reference", **{argument: "auto"})
