"""The TPU kernels in Pallas's interpreter, and which calls they take."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of keys, V of values
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.platform import log_once
from pallas_kernels.delta_attention import delta_attention, tile_layout

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

INTERPRETED = functools.partial(dict, implementation="pallas_tpu", interpret=True)
SLOW = {
  "chunks of 64": dict(T=80, B=1, segments=True),
  "one position": dict(T=1),
  "decays of heads, grouped": dict(T=70, B=1, H=2, N=4, decay="heads", segments=True),
  "gates of channels": dict(T=25, B=1, erase="channels", write="channels"),
  "no decay, segments": dict(T=25, decay=None, segments=True),
  "nothing but keys and values": dict(T=40, B=1, decay=None, erase=None, write=None),
  "width 100, three heads": dict(T=20, B=1, K=100, V=60, H=3, N=3),
  "width 256": dict(T=16, B=1, K=256, V=130, N=1),
}


def test_is_the_recurrence(Case, run, recur, assert_close, monkeypatch):
  """Chunks of 16 take a third of the compile time; the slow tests have those of 64."""
  monkeypatch.setattr(tile_layout, "CHUNK", 16)
  arrays = Case(T=40, B=1, segments=True).arrays()
  assert_close(run(arrays, **INTERPRETED()), recur(arrays))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_is_the_recurrence_at_other_shapes(case, Case, run, recur, assert_close):
  arrays = Case(**SLOW[case]).arrays()
  assert_close(run(arrays, **INTERPRETED()), recur(arrays))


@pytest.mark.slow
def test_unusual_decays(Case, run, recur, assert_close):
  arrays = Case(T=80, B=1, segments=True).arrays()
  rng = np.random.default_rng(0)
  sizes = np.array([0, 1e-3, 1.0, 20.0, 1e4], np.float32)
  for decay in (np.full(5, 0), np.full(5, 5), np.full(5, 20), np.full(5, 1e4), sizes):
    arrays["decay"] = -rng.choice(decay, arrays["decay"].shape).astype(np.float32)
    assert_close(run(arrays, **INTERPRETED()), recur(arrays))


@pytest.mark.slow
def test_norm_and_gates(Case, run, assert_close):
  arrays = Case(T=25, segments=True).arrays()
  rng = np.random.default_rng(0)
  arrays["decay"] = 3 * rng.normal(size=arrays["decay"].shape).astype(np.float32)
  arrays["k"][:, 3] = 0
  arrays["a_log_N"] = rng.uniform(0, 1, 2).astype(np.float32)
  arrays["dt_bias"] = rng.normal(size=(2, 20)).astype(np.float32)
  options = dict(gate="softplus", l2norm=True)
  assert_close(run(arrays, **INTERPRETED(), **options), run(arrays, "reference", **options))


BFLOAT16 = dict(o=6e-3, state=6e-3, dq=1e-2, dk=1e-2, dv=1e-2, derase=2e-2, dwrite=2e-2)
BFLOAT16 |= dict(ddecay=2e-2, dstate=1e-2)


@pytest.mark.slow
def test_bfloat16(Case, run, recur, assert_close):
  arrays = Case(T=300, segments=True).arrays(jnp.bfloat16)
  got = run(arrays, **INTERPRETED())
  assert got["o"].dtype == got["dq"].dtype == jnp.bfloat16 and got["state"].dtype == np.float32
  assert_close(got, recur(arrays), BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v", "q", "do"])
def test_a_bad_number_stays_in_its_segment(name, Case, run):
  """It reaches what it reaches in plain JAX; the rest has the same bits as without it."""
  arrays = Case(T=80, B=1, segments=True).arrays()
  arrays["segment_ids"] = np.repeat([0, 1], [50, 30]).astype(np.int32)[None]
  clean = run(arrays, **INTERPRETED())
  arrays[name][0, 20, 0] = np.nan
  got, want = run(arrays, **INTERPRETED()), run(arrays, "xla")
  for key, x in got.items():
    bad = np.isnan(want[key])
    np.testing.assert_array_equal(np.isnan(x), bad, err_msg=key)
    np.testing.assert_array_equal(x[~bad], clean[key][~bad], err_msg=key)
  assert np.isnan(got["dk"]).any() and np.isnan(got["o"]).any() == (name != "do")


def mesh_of(platform, kind):
  """A mesh of one device of another platform, which only tracing can use."""
  device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  axes = (jax.sharding.AxisType.Explicit,)
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), axes, abstract_device=device))


def test_the_kernel_is_taken_where_it_can_run(caplog):
  def trace(dtype, **options):
    x = jax.ShapeDtypeStruct((1, 64, 2, 8), dtype)
    jax.eval_shape(functools.partial(delta_attention, **options), x, x, x)

  log_once.cache_clear()
  with caplog.at_level(logging.INFO):
    with mesh_of("tpu", "TPU v5e"):
      trace(jnp.bfloat16)
      with pytest.raises(UnsupportedError, match="q_BTHK.dtype=float16, the MXU multiplies"):
        trace(jnp.float16, implementation="pallas_tpu")
    trace(jnp.float32)
  runs = [line for line in caplog.messages if line.startswith("delta_attention runs")]
  assert runs == ["delta_attention runs pallas_tpu on tpu", "delta_attention runs xla on cpu"]
  with pytest.raises(UnsupportedError, match="the device is 'cpu', not a TPU; interpret=True"):
    trace(jnp.float32, implementation="pallas_tpu")
  with pytest.raises(UnsupportedError, match="interpret=2 is neither True nor"):
    trace(jnp.float32, implementation="pallas_tpu", interpret=2)
