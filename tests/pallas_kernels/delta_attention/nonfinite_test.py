"""NaN and infinities reach what depends on them by the recurrence, and nothing else."""

# B batch, T positions, N heads of values, K width of keys, V width of values
import jax.numpy as jnp
import numpy as np
import pytest

BAD = 40  # of 130 positions, inside a chunk
CHUNKED = ["xla"]


@pytest.fixture(name="arrays")
def arrays_fixture(Case):
  arrays = Case(segments=True).arrays()
  ids = np.zeros((2, 130), np.int32)
  ids[:, 55:] = 1
  ids[:, 100:] = 2
  return arrays | {"segment_ids": ids}


@pytest.mark.parametrize("name", ["q", "k", "v", "decay", "erase", "write", "state", "do"])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_a_bad_number_stays_in_its_segment(implementation, name, arrays, run):
  """And in its row, and in the other direction for gradients."""
  clean = run(arrays, implementation)
  bad = np.array(arrays[name])
  bad[(0, ...) if name == "state" else (0, BAD)] = -np.inf if name == "v" else np.nan
  got = run(arrays | {name: bad}, implementation)
  for key, x in got.items():
    np.testing.assert_array_equal(x[1], clean[key][1], err_msg=key)
    if x.shape[1] == 130:
      np.testing.assert_array_equal(x[0, 55:], clean[key][0, 55:], err_msg=key)
  assert np.isfinite(got["state"]).all() and np.isnan(got["o"]).any() != (name == "do")
  first = {"state": 0, "q": BAD, "do": 55}.get(name, BAD)
  np.testing.assert_array_equal(got["o"][0, :first], clean["o"][0, :first])
  if name == "q":
    assert np.isnan(got["o"][0, BAD]).all()
    np.testing.assert_array_equal(got["o"][0, BAD + 1 :], clean["o"][0, BAD + 1 :])
  elif name != "do":
    assert np.isnan(got["o"][0, first:55]).all()
  if name in ("do", "q"):
    assert np.isnan(got["dv"][0, : BAD + 1]).all() and np.isnan(got["dstate"][0]).all()
    np.testing.assert_array_equal(got["dv"][0, BAD + 1 :], clean["dv"][0, BAD + 1 :])
  assert np.isnan(got["dq"][0, 0 if name == "state" else BAD]).all()
  assert np.isfinite(got["dq"][0, :first]).all() or name == "do"


@pytest.mark.parametrize("implementation", CHUNKED)
def test_a_log_decay_of_minus_infinity_clears_a_channel(implementation, arrays, run, assert_close):
  decay = np.array(arrays["decay"])
  decay[:, ::7] = -1e4
  want = run(arrays | {"decay": decay}, implementation)
  decay[:, ::7] = -np.inf
  assert_close(run(arrays | {"decay": decay}, implementation), want)
  assert jnp.all(jnp.isfinite(want["o"]))
