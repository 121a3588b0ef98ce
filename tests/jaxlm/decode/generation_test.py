"""Generation: prompts of different lengths, the end of a row, draws, steps and compilations."""

import functools

import chex
import jax
import numpy as np
import pytest

from jaxlm.config import RopeConfig, decoder, revise
from jaxlm.decode import NoDistribution, Sampler, generate, generation
from jaxlm.models import Transformer
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

CONFIG = decoder(V=61, D=16, F=24, N=2, K=1, H=8, layers=2, windows=(4, None))
MODEL = Transformer(CONFIG)
DYNAMIC = revise(CONFIG, rope=RopeConfig(scaling="dynamic", factor=4.0, original_length=4))
PROMPTS = [[3, 1, 4, 1, 5], [2], [7, 7, 0]]
GREEDY = Sampler(temperature=0)
NEW, WIDTH = 6, 11


@pytest.fixture(scope="module")
def params():
  """Weights large enough that greedy continuations differ."""
  return jax.tree.map(lambda w: 3 * w, MODEL.init(jax.random.key(3)))


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


def run(params, prompts, *, model=MODEL, sampler=GREEDY, T=16, max_new=NEW, eos=-1):
  """The whole state at the end, of prompts padded to T."""
  ids_BT = np.zeros((len(prompts), T), np.int32)
  for row, prompt in zip(ids_BT, prompts):
    row[: len(prompt)] = prompt
  lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
  options = {"sampler": sampler, "buffer": 16, "max_new": max_new}
  options["eos"] = np.atleast_1d(np.int32(eos))
  key = jax.random.key(0)
  return generation.generate_tokens(model, params, ids_BT, lengths_B, key=key, **options)


def test_greedy_prompts_of_different_lengths_equal_full_passes(params, greedy):
  got = generate(CONFIG, params, PROMPTS, sampler=GREEDY, max_new=NEW)
  np.testing.assert_array_equal(got, greedy)
  assert len(set(map(tuple, got.tolist()))) == len(PROMPTS)


def test_after_the_end_only_the_end_follows(params, greedy):
  eos = int(greedy[0, 2])
  got = generate(CONFIG, params, PROMPTS, sampler=GREEDY, max_new=NEW, eos=eos)
  chex.assert_shape(got, greedy.shape)
  for row, want in zip(got, greedy):
    ends = np.flatnonzero(want == eos)
    stop = ends[0] if len(ends) else NEW
    np.testing.assert_array_equal(row[:stop], want[:stop])
    assert set(row[stop:].tolist()) <= {eos}


def test_any_of_several_ends_ends_a_row(params, greedy):
  ends = [int(greedy[0, 3]), int(greedy[1, 1])]
  got = generate(CONFIG, params, PROMPTS, sampler=GREEDY, max_new=NEW, eos=ends)
  for row, want in zip(got, greedy):
    stop = next((i for i, id in enumerate(want) if id in ends), NEW - 1) + 1
    np.testing.assert_array_equal(row[:stop], want[:stop])
    assert set(row[stop:].tolist()) <= {ends[0]}


def test_ids_that_may_not_be_drawn_are_not(params, greedy):
  drawable_V = np.isin(np.arange(CONFIG.V), greedy, invert=True)
  got = generate(CONFIG, params, PROMPTS, sampler=GREEDY, max_new=NEW, drawable_V=drawable_V)
  assert drawable_V[got].all()
  only = np.arange(CONFIG.V) == 5
  hot = Sampler(temperature=9.0)
  got = generate(CONFIG, params, PROMPTS, sampler=hot, max_new=NEW, drawable_V=only)
  assert (got == 5).all()
  with pytest.raises(UserError, match="drawable_V of shape=.*must have V=61 entries"):
    generate(CONFIG, params, PROMPTS, max_new=1, drawable_V=only[:-1])


@pytest.mark.parametrize("sampler", [GREEDY, Sampler()])
def test_logits_that_are_nan_are_no_distribution(params, sampler):
  """Of all rows from the start, or of one row later: the third has the NaN embedding of 7."""
  nan = jax.tree.map(lambda w: w * np.nan, params)
  with pytest.raises(NoDistribution, match=r"after 0 new tokens: the logits of rows \[0, 1, 2\]"):
    generate(CONFIG, nan, PROMPTS, sampler=sampler, max_new=NEW)
  one = params | {"embed": {"weight": params["embed"]["weight"].at[7].set(np.nan)}}
  with pytest.raises(NoDistribution, match=r"logits of rows \[2\] are NaN"):
    generate(CONFIG, one, PROMPTS, sampler=sampler, max_new=NEW)


def test_no_step_after_every_row_has_ended(params, greedy):
  """Tokens drawn per row, of which all but the first take a decoding step."""
  for row in range(len(PROMPTS)):
    eos = int(greedy[row, 1])
    first_B = [(list(want).index(eos) + 1) if eos in want else NEW for want in greedy]
    assert int(run(params, PROMPTS, eos=eos).steps) == max(first_B)
    assert int(run(params, [PROMPTS[row]], eos=eos).steps) == first_B[row] < NEW
  assert int(run(params, PROMPTS).steps) == NEW
  assert int(run(params, PROMPTS, max_new=1).steps) == 1


def test_draws_depend_on_the_key_and_on_nothing_else(params):
  draw = functools.partial(
    generate, CONFIG, params, PROMPTS, sampler=Sampler(temperature=2.0), max_new=NEW
  )
  first, again, other = (draw(key=jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any() and 0 <= first.min() and first.max() < CONFIG.V


@pytest.mark.slow
def test_draws_of_a_row_do_not_depend_on_the_others(params):
  sampler = Sampler(temperature=2.0)
  alone = run(params, PROMPTS[:1], sampler=sampler).ids_BM[0]
  for others in (PROMPTS[1:], [[9] * 12, [1]]):
    among = run(params, [PROMPTS[0], *others], sampler=sampler).ids_BM[0]
    np.testing.assert_array_equal(alone, among)
  same, twice = run(params, PROMPTS[:1] * 2, sampler=sampler).ids_BM
  np.testing.assert_array_equal(same, alone)
  assert (twice != same).any()


@pytest.mark.slow
def test_dynamic_rope_does_not_look_at_the_neighbours(params):
  """Beyond its original length of 4 the frequencies follow the length of each row."""
  model = Transformer(DYNAMIC)
  short, long = [3, 1, 4, 1, 5, 9, 2], [5, 9, 2, 11, 3, 8, 1, 7, 4, 13, 6, 12, 0, 2, 8, 5]
  alone = prefill_logits(model, params, [short])
  chex.assert_trees_all_close(prefill_logits(model, params, [short, long])[:1], alone, atol=1e-5)
  assert np.abs(prefill_logits(MODEL, params, [short]) - alone).max() > 1e-2  # it does scale
  ids_M = run(params, [short], model=model).ids_BM[0]
  np.testing.assert_array_equal(run(params, [short, long], model=model).ids_BM[0], ids_M)


@functools.partial(jax.jit, static_argnums=0)
def prefill(model, params, ids_BT, lengths_B):
  cache = model.init_cache(*ids_BT.shape)
  return generation.prefill(model, params, ids_BT, lengths_B, cache)[0]


def prefill_logits(model, params, prompts, T=16, padding=0):
  ids_BT = np.full((len(prompts), T), padding, np.int32)
  for row, prompt in zip(ids_BT, prompts):
    row[: len(prompt)] = prompt
  return np.asarray(prefill(model, params, ids_BT, np.array([len(prompt) for prompt in prompts])))


@pytest.mark.parametrize(
  "model",
  [
    pytest.param(MODEL, id="plain"),
    pytest.param(Transformer(DYNAMIC), id="dynamic", marks=pytest.mark.slow),
  ],
)
def test_padding_changes_nothing(model, params):
  logits_BV = prefill_logits(model, params, PROMPTS)
  np.testing.assert_array_equal(prefill_logits(model, params, PROMPTS, padding=9), logits_BV)
  chex.assert_trees_all_close(prefill_logits(model, params, PROMPTS, T=32), logits_BV, atol=1e-5)
  for prompt, logits_V in zip(PROMPTS, logits_BV):
    want_BTV = forward(model.config, params, np.array([prompt], np.int32))
    chex.assert_trees_all_close(logits_V, np.asarray(want_BTV[0, -1]), atol=1e-5)


@pytest.mark.slow
def test_one_compilation_serves_many_lengths(params, monkeypatch):
  chex.clear_trace_counter()
  counted = chex.assert_max_traces(generation.generate_tokens.__wrapped__, n=2)
  static = ("model", "sampler", "buffer")
  monkeypatch.setattr(generation, "generate_tokens", jax.jit(counted, static_argnames=static))
  for length in (1, 2, 7, 15, 16):
    for max_new in (1, 3, 16):
      generate(CONFIG, params, [[1] * length, [2]], max_new=max_new, eos=max_new)
  generate(CONFIG, params, [[1] * 17, [2]], max_new=3)  # the next power of two
  with pytest.raises(AssertionError, match="traced"):
    generate(CONFIG, params, [[1] * 33, [2]], max_new=3)


def shapes_in(jaxpr):
  """Shapes of all values of a jaxpr and of those inside it."""
  for equation in jaxpr.eqns:
    yield from (value.aval.shape for value in equation.outvars)
    for parameter in jax.tree.leaves(list(equation.params.values())):
      if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
        yield from shapes_in(getattr(parameter, "jaxpr", parameter))


def holds_all_logits(function, *arguments):
  """Whether any value has the vocabulary as an axis beside T positions."""
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  return any({T, CONFIG.V} <= set(shape) for shape in shapes_in(jaxpr))


T = 24  # no other axis has this size


def test_prefill_computes_the_head_for_one_position_per_row(params):
  ids_BT, lengths_B = np.zeros((3, T), np.int32), np.array([5, T, 1])
  assert not holds_all_logits(functools.partial(prefill, MODEL), params, ids_BT, lengths_B)
  assert holds_all_logits(MODEL.apply, params, ids_BT)  # the search finds them
  options = {"sampler": GREEDY, "buffer": 16, "max_new": 3, "eos": np.array([1])}
  options["key"] = jax.random.key(0)
  whole = functools.partial(generation.generate_tokens, MODEL, **options)
  assert not holds_all_logits(whole, params, ids_BT, lengths_B)


@pytest.mark.parametrize(
  "prompts, max_new, field",
  [
    ([], 3, "prompt_ids"),
    ([[1], []], 3, "prompt_ids"),
    ([[1, 61]], 3, "prompt_ids=61"),
    ([[5, -1]], 3, "prompt_ids=-1"),
    ([[1]], 0, "max_new"),
  ],
)
def test_what_cannot_be_generated_is_refused_by_name(params, prompts, max_new, field):
  with pytest.raises(UserError, match=field):
    generate(CONFIG, params, prompts, max_new=max_new)


@pytest.mark.parametrize("eos", [-1, 61])
def test_an_end_that_no_row_can_draw_is_refused(params, eos):
  with pytest.raises(UserError, match=f"eos={eos}: ids run from 0 to V - 1 = 60"):
    generate(CONFIG, params, PROMPTS, max_new=3, eos=eos)
