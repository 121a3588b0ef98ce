import functools

import jax
import numpy as np
import pytest

from jaxlm.config import decoder
from jaxlm.decode import Sampler, generate
from jaxlm.models import Transformer

CONFIG = decoder(V=16, D=16, F=24, N=2, K=1, H=8, layers=2, windows=(4, None))
PROMPTS = [[3, 1, 4, 1, 5], [2], [7, 7, 0]]
GREEDY = Sampler(temperature=0)
NEW, WIDTH = 6, 11


@pytest.fixture(scope="module")
def params():
  return jax.jit(Transformer(CONFIG).init)(jax.random.key(3))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, ids_BT):
  return Transformer(config).apply(params, ids_BT)


@pytest.fixture(scope="module")
def greedy(params):
  """Continuations by full forward passes, one token at a time, one prompt at a time."""
  rows = []
  for prompt in PROMPTS:
    ids = list(prompt)
    for _ in range(NEW):
      padded = np.array([ids + [0] * (WIDTH - len(ids))], np.int32)
      ids.append(int(np.argmax(forward(CONFIG, params, padded)[0, len(ids) - 1])))
    rows.append(ids[len(prompt) :])
  return np.array(rows)


def test_greedy_prompts_of_different_lengths_equal_full_passes(params, greedy):
  got = generate(CONFIG, params, PROMPTS, sampler=GREEDY, max_new=NEW)
  np.testing.assert_array_equal(got, greedy)
  assert len(set(map(tuple, got.tolist()))) == len(PROMPTS)


def test_after_the_end_only_the_end_follows(params, greedy):
  eos = int(greedy[0, 2])
  got = generate(CONFIG, params, PROMPTS, sampler=GREEDY, max_new=NEW, eos=eos)
  for row, want in zip(got, greedy):
    ends = np.flatnonzero(want == eos)
    stop = ends[0] if len(ends) else NEW
    np.testing.assert_array_equal(row[:stop], want[:stop])
    assert set(row[stop:]) <= {eos}


def test_draws_depend_on_the_key_and_on_nothing_else(params):
  draw = functools.partial(
    generate, CONFIG, params, PROMPTS, sampler=Sampler(temperature=2.0), max_new=NEW
  )
  first, again, other = (draw(key=jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any() and 0 <= first.min() and first.max() < CONFIG.V


@pytest.mark.parametrize(
  "prompts, max_new, field",
  [
    ([], 3, "prompt_ids"),
    ([[1], []], 3, "prompt_ids"),
    ([[1, 16]], 3, "prompt_ids=16"),
    ([[5, -1]], 3, "prompt_ids=-1"),
    ([[1]], 0, "max_new"),
  ],
)
def test_what_cannot_be_generated_is_refused_by_name(params, prompts, max_new, field):
  with pytest.raises(ValueError, match=field):
    generate(CONFIG, params, prompts, max_new=max_new)
