"""The product on Explicit meshes: rows, columns and the contracted axis spread over devices."""

# Y[M, N] = X[M, K] W[K, N]
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.errors import UnsupportedError, UserError
from pallas_kernels.fp8_matmul import fp8_matmul
from tests.pallas_kernels.fp8_matmul.oracle import error, problem, products

SPECS = {
  "rows and columns": (P("data", None, None), P(None, "tensor"), P("data", None, "tensor")),
  "contracted": (P("data", None, "tensor"), P("tensor", None), P("data", None, None)),
}


@functools.cache
def make_mesh():
  kinds = (AxisType.Explicit,) * 2
  return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=kinds, devices=jax.devices()[:4])


@jax.jit
def run(x, w, dy):
  y, pull_back = jax.vjp(lambda x, w: fp8_matmul(x, w, allow_emulation=True), x, w)
  return y, *pull_back(dy)


def place(array, spec):
  return jax.device_put(array, jax.NamedSharding(make_mesh(), spec))


@pytest.mark.parametrize("name", SPECS)
def test_a_mesh_computes_what_one_device_does(name):
  """A device's rows are whole tiles here, so that the codes are the same, too."""
  x, w, dy = problem(256, 256, 256)
  want = products(x, w, dy)
  arrays = x.reshape(2, 128, 256), w, dy.reshape(2, 128, 256)
  with jax.set_mesh(make_mesh()):
    got = run(*map(place, arrays, SPECS[name]))
  assert [jax.typeof(array).sharding.spec for array in got[1:]] == list(SPECS[name][:2])
  assert jax.typeof(got[0]).sharding.spec == SPECS[name][2]
  for ours, theirs in zip(got, want):
    assert error(np.asarray(ours).reshape(theirs.shape), theirs) < 1e-6


def test_spreads_that_are_refused():
  x, w, _ = problem(256, 192, 256)
  with jax.set_mesh(make_mesh()):
    with pytest.raises(UnsupportedError, match="would have 96 of its axis 0, which cuts blocks"):
      fp8_matmul(place(x, P(None, "data")), place(w, P("data", None)), allow_emulation=True)
    with pytest.raises(UserError, match=r"its K must be spread like X's, over \('data',\)"):
      fp8_matmul(place(x, P(None, "data")), place(w, P()), allow_emulation=True)
    with pytest.raises(UserError, match=r"both spread over \['data'\]"):
      fp8_matmul(place(x, P("data")), place(w, P(None, "data")), allow_emulation=True)


def test_a_gradient_may_stay_unsummed():
  """A weight typed `reduced` gets each device's own share, to be added once a step."""
  x, w, dy = problem(256, 128, 128)
  with jax.set_mesh(make_mesh()):
    w = jax.reshard(jnp.asarray(w), P(None, None, reduced={"data"}))
    x, dy = place(x, P("data", None)), place(dy, P("data", None))
    shares = run(x, w, dy)[2]
    assert jax.typeof(shares).sharding.spec.unreduced == {"data"}
    whole = jax.jit(lambda shares: jax.reshard(shares, P(None, None)))(shares)
  assert error(whole, products(x, w, dy)[2]) < 1e-6
