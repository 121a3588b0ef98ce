"""Gradient filtering and vocabulary sorting: what is dropped is small, what is kept is exact, aux tells how much."""

# N tokens, D model, V vocabulary
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import blocks, linear_cross_entropy

BACKENDS = ("xla", "pallas_tpu")
N, D, V = 256, 16, 640


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  monkeypatch.setattr(blocks, "xla_tiles", lambda N, V: blocks.Blocks(min(N, 128), min(V, 128)))
  monkeypatch.setattr(blocks, "xla_chunk", lambda N, V: blocks.Blocks(min(N, 128), min(V, 128)))


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


def error(got, want):
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("sort", [False, True], ids=["in order", "sorted"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_filtered_gradients_are_close_and_skip_tiles(implementation, sort):
  _, exact_e, exact_c = gradients("reference")
  options = dict(filter_e="auto", filter_c="auto", sort_vocabulary=sort, return_aux=True)
  (loss_N, aux), de_ND, dc_VD = gradients(implementation, **options)
  assert (
    error(de_ND, exact_e) < 5e-3 and error(dc_VD, exact_c) < 2.5e-3
  )  # the last rounding alone is 1.7e-3
  assert loss_N.shape == (N,)
  assert 0 < aux.kept_e <= 1 and aux.kept_e == aux.kept_c
  if sort:
    unsorted = gradients(implementation, **{**options, "sort_vocabulary": False})[0][1]
    assert aux.kept_e < unsorted.kept_e


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
  """All logits alike: 1 / V is below the threshold, and every tile without a target goes, small gradient or not."""
  arrays = jnp.zeros((128, 4)), jnp.ones((5120, 4)), jnp.zeros(128, jnp.int32)
  (_, aux), _, dc_VD = gradients(
    "pallas_tpu", arrays=(arrays[0] + 1, *arrays[1:]), filter_c=1e-3, return_aux=True
  )
  assert aux.kept_c == 1 / 40 and aux.kept_e == 1
  assert not dc_VD[128:].any()
  _, _, exact_VD = gradients("pallas_tpu", arrays=(arrays[0] + 1, *arrays[1:]))
  assert np.allclose(exact_VD[128:], 128 / 5120)


def test_the_whole_bracket_is_tested_with_z_loss():
  """Far above 0 the z-loss makes small probabilities matter: 2 z lse p, not p, is compared with the threshold."""
  arrays = peaked(jnp.float32)
  plain = gradients("xla", arrays=arrays, filter_c=1e-2, return_aux=True)[0][1]
  with_z = gradients("xla", arrays=arrays, filter_c=1e-2, z_loss=1e3, return_aux=True)[0][1]
  assert with_z.kept_c >= plain.kept_c


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
