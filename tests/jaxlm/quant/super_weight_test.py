"""A planted super weight is found, matters, and survives quantisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import decoder
from jaxlm.config.formats import UniformFormat
from jaxlm.models import Transformer
from jaxlm.quant import super_weight, uniform

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

MODEL = decoder(V=32, D=64, F=256, N=2, K=2, H=8, layers=6)
IDS_BT = np.arange(16, dtype=np.int32)[None]
LAYER, ROW, COLUMN, VALUE = 2, 7, 5, 3.0


@functools.cache
def planted():
  """One entry of `down`, read by a channel that is made large by its gate and up columns."""
  params = Transformer(MODEL).init(jax.random.key(0))
  feedforward = params["stacks"]["0"]["0"]["feedforward"]
  for name in ("gate", "up"):
    weight = feedforward[name]["weight"]
    feedforward[name]["weight"] = weight.at[LAYER, :, ROW].mul(9.0)
  return super_weight.plant(MODEL, params, LAYER, ROW, COLUMN, VALUE)


@functools.partial(jax.jit)
def states(params):
  return Transformer(MODEL).apply(params, IDS_BT, logits=False)


def test_it_is_found_first_and_the_search_ends_when_it_is_gone():
  found = super_weight.find_super_weights(MODEL, planted(), IDS_BT)
  assert 1 <= len(found) <= 2
  first = found[0]
  assert first.name == f"layers.{LAYER}.feedforward.down"
  assert (first.row, first.column, first.value) == (ROW, COLUMN, VALUE)
  assert abs(first.output_spike) == pytest.approx(VALUE * abs(first.input_spike), rel=0.1)


def test_without_it_the_model_changes_more_than_without_the_next_largest_weights():
  params = planted()
  weight = super_weight.SuperWeight(f"layers.{LAYER}.feedforward.down", ROW, COLUMN, VALUE, 0, 0)
  ablated = super_weight.scale_weights(MODEL, params, [weight], 0.0)
  params, ablated = jax.device_get((params, ablated))
  down = params["stacks"]["0"]["0"]["feedforward"]["down"]["weight"]
  assert ablated["stacks"]["0"]["0"]["feedforward"]["down"]["weight"][LAYER, ROW, COLUMN] == 0
  assert down[LAYER, ROW, COLUMN] == VALUE  # what was given is as it was
  large = np.sort(np.abs(down).ravel())[-51]
  others = np.where((np.abs(down) >= large) & (down != VALUE), 0, down)
  pruned = jax.tree.map(lambda w: others if w is down else w, params)
  whole, without, fewer = (np.asarray(states(p)) for p in (params, ablated, pruned))
  assert np.abs(without - whole).mean() > 1.5 * np.abs(fewer - whole).mean()


@pytest.mark.slow
def test_clipping_and_restoring_it_beats_rounding_to_the_nearest():
  params = planted()
  format = UniformFormat(bits=4, grid="affine", shared="tensor")
  weight = super_weight.SuperWeight(f"layers.{LAYER}.feedforward.down", ROW, COLUMN, VALUE, 0, 0)
  kept = super_weight.quantize_around(MODEL, params, [weight], format, z=4.0)
  naive = super_weight.quantize_around(MODEL, params, [], format, z=1e6)
  down = kept["stacks"]["0"]["0"]["feedforward"]["down"]["weight"]
  assert down[LAYER, ROW, COLUMN] == VALUE
  assert len(np.unique(np.asarray(down[LAYER]).round(6))) <= 17
  whole = states(params)
  errors = [float(jnp.abs(states(p) - whole).mean()) for p in (kept, naive)]
  assert errors[0] < errors[1]
  exact, *rounded = (
    p["stacks"]["0"]["0"]["feedforward"]["down"]["weight"][LAYER] for p in (params, kept, naive)
  )
  errors = [float(jnp.linalg.norm(w - exact)) for w in rounded]
  assert errors[0] < 0.5 * errors[1]


def test_a_super_activation_is_left_out_of_the_grid_and_restored():
  x_ZD = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32).at[1, 9].set(500.0)
  format = UniformFormat(bits=8)
  kept = super_weight.quantize_activations_around(x_ZD, format, (1, 9))
  assert kept[1, 9] == 500.0
  error = jnp.abs(kept - x_ZD)[1].max()
  assert error < 0.02 < 1 < jnp.abs(uniform.quantize(x_ZD, format) - x_ZD)[1].max()
