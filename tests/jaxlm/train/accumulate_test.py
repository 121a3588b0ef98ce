import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import DataConfig, TrainConfig, decoder
from jaxlm.data.packing import Batch
from jaxlm.objectives.weighted import Weighted
from jaxlm.run.text import TextTask
from jaxlm.train import init_state
from jaxlm.train.accumulate import accumulated_gradients, split_batch

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

CONFIG = TrainConfig(
  batch=12,
  z_loss=1e-2,
  model=decoder(V=16, D=8, F=12, N=2, K=1, H=4, layers=1),
  data=DataConfig(length=8),
)


def make_batch(lengths) -> Batch:
  draw = np.random.default_rng(0)
  ids_BT = draw.integers(0, 16, (len(lengths), 9)).astype(np.int32)
  weights_BT = (np.arange(8) < np.array(lengths)[:, None]).astype(np.float32)
  return Batch(ids_BT[:, :-1], ids_BT[:, 1:], weights_BT)


# micro-batch m of 3 holds rows m, m + 3, ...: unequal token counts, the third masked entirely
UNEQUAL = make_batch([8, 1, 0, 3, 7, 0, 2, 5, 0, 8, 1, 0])


def objective(params, batch, key):
  return TextTask(CONFIG).objective(params, {}, batch, key)


@functools.partial(jax.jit, static_argnums=2)
def gradients(params, batch, microbatches):
  """Returns (gradient, cross-entropy) of a batch."""
  key = jax.random.key(0)
  grads, terms = accumulated_gradients(objective, params, batch, key, microbatches)
  return grads, terms["loss"]


@pytest.fixture(scope="module")
def params():
  return init_state(CONFIG, TextTask(CONFIG)).params


def flat(tree) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("microbatches", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_micro_batches_of_unequal_token_counts_equal_the_full_batch(params, microbatches):
  want_grads, want = gradients(params, UNEQUAL, 1)
  grads, loss = gradients(params, UNEQUAL, microbatches)
  assert loss.den == want.den == 35
  assert loss.mean() == pytest.approx(float(want.mean()), rel=1e-6)
  assert np.linalg.norm(flat(grads) - flat(want_grads)) < 1e-6 * np.linalg.norm(flat(want_grads))


def test_the_mean_of_the_micro_batches_means_is_something_else(params):
  """So the test above cannot pass by averaging means."""
  parts = [jax.tree.map(lambda x, m=m: x[m::3], UNEQUAL) for m in range(3)]
  means = np.mean([flat(gradients(params, part, 1)[0]) for part in parts], axis=0)
  full = flat(gradients(params, UNEQUAL, 1)[0])
  assert np.linalg.norm(means - full) > 0.05 * np.linalg.norm(full)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_objective_is_traced_once(microbatches):
  @chex.assert_max_traces(n=1)
  def objective(params, batch, key):
    return {"loss": Weighted(jnp.sum(params * batch), jnp.float32(batch.size))}

  chex.clear_trace_counter()
  arguments = jnp.ones(()), jnp.ones(4), jax.random.key(0)
  jax.eval_shape(lambda *args: accumulated_gradients(objective, *args, microbatches), *arguments)


def test_a_batch_without_any_target_has_gradient_zero(params):
  grads, loss = gradients(params, make_batch([0] * 12), 3)
  assert loss.mean() == 0 and not flat(grads).any()


def test_padding_rows_change_nothing(params):
  lengths = [8, 1, 3, 7, 2, 5]
  short, padded = make_batch(lengths), make_batch(lengths)
  padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), padded)
  (want, want_loss), (got, loss) = gradients(params, short, 1), gradients(params, padded, 1)
  assert loss.den == want_loss.den
  np.testing.assert_allclose(flat(got), flat(want), rtol=0, atol=1e-6 * np.abs(flat(want)).max())


def test_every_row_is_in_one_micro_batch():
  rows_MB = split_batch(jnp.arange(12), 3)
  chex.assert_shape(rows_MB, (3, 4))
  assert sorted(np.ravel(rows_MB)) == list(range(12))
