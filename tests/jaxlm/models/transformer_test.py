import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.config import ComputeConfig, ModelConfig, RopeConfig, decoder, revise
from jaxlm.data.packing import join, pack
from jaxlm.models import Transformer, roles
from jaxlm.models.mixers.context import Context
from jaxlm.objectives import token_logprobs
from pallas_kernels.common.errors import UserError
from sharding import MeshConfig, make_mesh
from sharding.rules import shard

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

# 80 positions: two query blocks of the blocked attention; every id once, so that a row of the
# embedding is a position
T = 80
SMALL = decoder(V=T, D=16, F=24, N=4, K=2, H=4, layers=2, windows=(5, None))
PLAIN = ComputeConfig()
BFLOAT16 = ComputeConfig(dtype="bfloat16")


@functools.cache
def init(config: ModelConfig):
  params = Transformer(config).init(jax.random.key(0))
  draw = np.random.default_rng(
    0
  )  # norm weights away from one, so that tests notice which one is used
  return jax.tree.map(
    lambda w: (w * draw.uniform(0.5, 1.5, w.shape)).astype(np.float32), jax.device_get(params)
  )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("compute", "in_order"))
def logits(config, params, ids_BT, positions=None, segment_ids=None, compute=PLAIN, in_order=False):
  model = Transformer(config, compute)
  return model.apply(
    params, ids_BT, positions=positions, segment_ids=segment_ids, in_order=in_order
  )


@pytest.mark.parametrize(
  "windows, implementation",
  [
    pytest.param((None,), "xla", marks=pytest.mark.slow),
    ((5,), "xla"),
    pytest.param((5, None), "reference", marks=pytest.mark.slow),
  ],
)
def test_no_gradient_reaches_a_later_position(windows, implementation):
  config = decoder(V=T, D=16, F=24, N=4, K=2, H=4, layers=2, windows=windows)
  model = Transformer(config, ComputeConfig(attention_implementation=implementation))
  params = init(config)
  ids_BT = np.arange(T)[None]
  ts = np.array([0, 1, 7, 63, 64, T - 1])

  @jax.jit
  def reached(embed_VD):
    """Which positions' inputs each chosen position's logits depend on, bool [t, T]."""

    def chosen(embed_VD):
      logits_BTV = model.apply(params | {"embed": {"weight": embed_VD}}, ids_BT)
      return (logits_BTV[0, ts] * jnp.linspace(1, 2, config.V)[None]).sum(-1)

    return jnp.any(jax.jacrev(chosen)(embed_VD) != 0, axis=-1)

  far = 2 * (5 - 1) if windows == (5,) else T  # two layers of window 5 see 8 back
  want = (ts[:, None] >= np.arange(T)) & (ts[:, None] - np.arange(T) <= far)
  np.testing.assert_array_equal(reached(params["embed"]["weight"]), want)


@pytest.mark.parametrize("implementation, in_order", [("xla", True), ("reference", False)])
def test_packed_rows_equal_the_separate_sequences(implementation, in_order):
  config, compute = SMALL, ComputeConfig(attention_implementation=implementation)
  draw = np.random.default_rng(1)
  documents = [draw.integers(1, config.V, size) for size in (30, 75, 11, 1, 52, 23, 40)]
  tokens_S, borders_D = join(documents, eos=0, dtype=np.dtype(np.int64))
  rows = pack(tokens_S, borders_D, T)
  batch = rows.build(np.arange(len(rows)))
  assert batch.segment_ids_BT.max() >= 3 and (batch.weights_BT == 0).any()
  packed = (batch.inputs_BT, batch.positions_BT, batch.segment_ids_BT)
  packed_BTV = logits(config, init(config), *packed, compute=compute, in_order=in_order)

  apart_DT = np.zeros((len(documents), T), np.int32)  # each document alone, after its eos
  for d, document in enumerate(documents):
    apart_DT[d, 1 : len(document) + 1] = document
  apart_DTV = logits(config, init(config), apart_DT, compute=compute)
  packed_BTV, apart_DTV = jax.device_get((packed_BTV, apart_DTV))
  seen = set()
  for b in range(len(rows)):
    for segment in range(1, batch.segment_ids_BT[b].max() + 1):
      at = np.flatnonzero(batch.segment_ids_BT[b] == segment)
      document = next(
        d
        for d, ids in enumerate(apart_DT)
        if np.array_equal(ids[: len(at)], batch.inputs_BT[b, at])
      )
      np.testing.assert_allclose(packed_BTV[b, at], apart_DTV[document, : len(at)], atol=1e-4)
      seen.add(document)
  assert seen == set(range(len(documents)))


DYNAMIC = decoder(
  V=T,
  D=16,
  F=24,
  N=4,
  K=2,
  H=4,
  layers=2,
  windows=(5, None),
  rope=RopeConfig(scaling="dynamic", factor=4.0, original_length=4),
)


@pytest.mark.parametrize("config", [SMALL, DYNAMIC], ids=["plain", "dynamic"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_permutation_of_tokens_and_positions_permutes_the_logits(config, remat):
  draw = np.random.default_rng(5)
  ids_BT = draw.integers(0, T, (2, 24))
  order_BT = np.stack([draw.permutation(24) for _ in range(2)])
  want_BTV = np.take_along_axis(
    np.asarray(logits(config, init(config), ids_BT)), order_BT[..., None], axis=1
  )
  permuted_BT = np.take_along_axis(ids_BT, order_BT, axis=1)
  compute = ComputeConfig(remat=remat)
  got_BTV = logits(config, init(config), permuted_BT, order_BT, compute=compute)
  np.testing.assert_allclose(got_BTV, want_BTV, rtol=0, atol=1e-5)


def test_a_permutation_across_segments_permutes_the_logits():
  draw = np.random.default_rng(6)
  ids_BT = draw.integers(0, T, (1, 24))
  positions_BT = np.concatenate([np.arange(9), np.arange(15)])[None]
  segments_BT = np.repeat([7, 3], [9, 15])[None]
  order_T = draw.permutation(24)
  packed = (ids_BT, positions_BT, segments_BT)
  want_BTV = logits(DYNAMIC, init(DYNAMIC), *packed, in_order=True)
  got_BTV = logits(DYNAMIC, init(DYNAMIC), *(x[:, order_T] for x in packed))
  np.testing.assert_allclose(got_BTV, want_BTV[:, order_T], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_positions_and_segments_in_any_order_are_those_of_one_device_on_a_mesh():
  draw = np.random.default_rng(8)
  ids_BT = draw.integers(0, T, (8, 24))
  order_BT = np.stack([draw.permutation(24) for _ in range(8)])
  segments_BT = draw.integers(0, 3, (8, 24))
  want_BTV = logits(DYNAMIC, init(DYNAMIC), ids_BT, order_BT, segments_BT)
  with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    params = jax.jit(Transformer(DYNAMIC).init)(jax.random.key(0))
    params = jax.tree.map(lambda w, like: jax.device_put(w, like.sharding), init(DYNAMIC), params)
    rows = [shard(jnp.asarray(x), "batch", None) for x in (ids_BT, order_BT, segments_BT)]
    got_BTV = jax.device_get(logits(DYNAMIC, params, *rows))
  np.testing.assert_allclose(got_BTV, want_BTV, rtol=0, atol=1e-5)


@pytest.mark.parametrize("in_order", [True, False])
def test_under_dynamic_scaling_a_packed_document_has_the_logits_that_it_has_alone(in_order):
  """Each document is longer than the original length 4, and of another length than the others."""
  sizes = (15, 6, 9)
  ids_BT = np.random.default_rng(7).integers(0, T, (1, 32))
  pieces = np.split(ids_BT, np.cumsum(sizes), axis=1)
  positions_BT = np.concatenate([*map(np.arange, sizes), [0, 0]])[None]
  segments_BT = np.repeat([1, 2, 3, 0], [*sizes, 2])[None]
  packed = (ids_BT, positions_BT, segments_BT)
  packed_BTV = logits(DYNAMIC, init(DYNAMIC), *packed, in_order=in_order)
  alone = [logits(DYNAMIC, init(DYNAMIC), piece) for piece in pieces[:-1]]
  want_BTV = np.concatenate(alone, axis=1)
  np.testing.assert_allclose(packed_BTV[:, :-2], want_BTV, rtol=0, atol=1e-5)


def test_scan_equals_the_python_loop_and_layer_order_is_that_of_the_pattern():
  config = revise(SMALL, layers=4)
  ids_BT = np.random.default_rng(2).integers(0, config.V, (2, 12))

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradients(scan, params):
    model = Transformer(config, ComputeConfig(scan=scan))
    out, pull = jax.vjp(lambda params: model.apply(params, ids_BT), params)
    return out, pull(jnp.cos(out))[0]

  looped, scanned = (value_and_gradients(scan, init(config)) for scan in ("never", "always"))
  chex.assert_trees_all_close(looped, scanned, atol=1e-5)
  # swapping two layers of a stack changes the result, so both agreeing on the order is no accident
  swapped = jax.tree.map(lambda w: w, init(config))
  swapped["stacks"]["0"]["0"] = jax.tree.map(lambda w: w[::-1], swapped["stacks"]["0"]["0"])
  assert np.abs(np.asarray(value_and_gradients("never", swapped)[0] - looped[0])).max() > 1e-3


def test_positions_shift_nothing_but_rotary_phase():
  """The same offset for all positions changes no logits; another distance between them does."""
  ids_BT, places_BT = np.arange(12)[None], np.arange(12)[None]
  config = SMALL
  plain = logits(config, init(config), ids_BT, places_BT)
  np.testing.assert_allclose(
    logits(config, init(config), ids_BT, places_BT + 1000), plain, atol=1e-4
  )
  assert np.abs(logits(config, init(config), ids_BT, 2 * places_BT) - plain).max() > 1e-3


@pytest.mark.parametrize("K", [1, 2])
def test_grouped_heads_equal_repeated_key_heads(K):
  """Query heads n*G .. n*G + G - 1 share key head n: with repeated heads it is multi-head."""
  N, H = 4, 4
  grouped = revise(SMALL, K=K)
  params = init(grouped)
  repeated = jax.tree.map(lambda w: w, params)
  for block in repeated["stacks"]["0"].values():
    for name in ("k", "v"):
      w_RDKH = block["mixer"][name]["weight"].reshape(-1, grouped.D, K, H)
      w_RDNH = np.repeat(w_RDKH, N // K, axis=2)
      block["mixer"][name]["weight"] = w_RDNH.reshape(-1, grouped.D, N * H)
  ids_BT = np.arange(12)[None]
  want = logits(revise(grouped, K=N), repeated, ids_BT)
  np.testing.assert_allclose(logits(grouped, params, ids_BT), want, atol=1e-5)


def test_a_tied_head_is_the_transposed_embedding():
  tied = revise(SMALL, tied=True)
  params = init(tied)
  assert "head" not in params
  untied = params | {"head": {"weight": params["embed"]["weight"].T}}
  ids_BT = np.arange(12)[None]
  np.testing.assert_allclose(logits(tied, params, ids_BT), logits(SMALL, untied, ids_BT), atol=1e-6)


def test_bfloat16_computes_beside_float32_weights_and_logits():
  params = init(SMALL)
  initial = jax.eval_shape(Transformer(SMALL, BFLOAT16).init, jax.random.key(0))
  chex.assert_type(jax.tree.leaves(initial), jnp.float32)
  ids_BT = np.arange(12)[None]
  half, single = (logits(SMALL, params, ids_BT, compute=c) for c in (BFLOAT16, PLAIN))
  chex.assert_type((half, single), jnp.float32)
  error = np.abs(np.asarray(half - single)).max()
  assert (
    1e-4 < error < 0.1 * np.abs(single).max()
  )  # bfloat16 was used, and no worse than its rounding
  # the products are in bfloat16, norms and softmax in float32
  program = jax.jit(Transformer(SMALL, BFLOAT16).apply).lower(params, ids_BT).as_text()
  dots = [line for line in program.splitlines() if "dot_general" in line]
  assert dots and all("bf16" in line.split("->")[0] for line in dots)
  assert not any("f32" in line.split("->")[0] for line in dots)
  for name, shape in (("rsqrt", ""), ("exponential", "x24x12x")):  # 12 queries of 2 heads, 12 keys
    lines = [
      line for line in program.splitlines() if f"stablehlo.{name} " in line and shape in line
    ]
    assert lines and not any("bf16" in line for line in lines)


def test_rounded_weights_in_bfloat16_give_the_same_logits():
  """Weights are cast once, to the compute type: rounding them before changes only the norms."""
  params = init(SMALL)
  roles_of_leaves = roles(SMALL)
  rounded = jax.tree.map(
    lambda w, role: w if role == "norm" else w.astype(ml_dtypes.bfloat16).astype(np.float32),
    params,
    roles_of_leaves,
  )
  ids_BT = np.arange(12)[None]
  np.testing.assert_array_equal(
    logits(SMALL, rounded, ids_BT, compute=BFLOAT16),
    logits(SMALL, params, ids_BT, compute=BFLOAT16),
  )


def test_fresh_weights_predict_every_id_alike():
  config = decoder(V=64, D=64, F=96, N=4, K=4, H=16, layers=4)
  params = jax.device_get(Transformer(config).init(jax.random.key(0)))
  ids_BT = np.random.default_rng(0).integers(0, 64, (4, 32))
  logits_BTV = logits(config, params, ids_BT, compute=ComputeConfig(scan="always"))
  loss = -jax.nn.log_softmax(logits_BTV)[:, :-1].mean()
  assert loss == pytest.approx(np.log(64), rel=0.15)
  w_LDZ = params["stacks"]["0"]["0"]["mixer"]["q"]["weight"]
  assert np.abs(w_LDZ[0] - w_LDZ[1]).max() > 0.01


HEADS = {
  "head": {},
  "tied, capped": {"tied": True, "logit_cap": 3.0},
}
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
QUICK_LOGPROBS = {("head", "float32", MESH), ("tied, capped", "bfloat16", None)}
LOGPROBS = [
  pytest.param(
    HEADS[name],
    dtype,
    tolerance,
    mesh,
    id=f"{name}, {dtype}, {'mesh' if mesh else 'one device'}",
    marks=() if (name, dtype, mesh) in QUICK_LOGPROBS else pytest.mark.slow,
  )
  for name in HEADS
  for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-3))
  for mesh in (None, MESH)
]


@pytest.mark.parametrize("fields, dtype, tolerance, mesh", LOGPROBS)
def test_logits_of_apply_agree_with_the_log_probabilities_of_the_loss(
  fields, dtype, tolerance, mesh
):
  """In float32 whatever the compute type: rounded to bfloat16, logits would be off by 0.05."""
  config = decoder(V=512, D=64, F=96, N=4, K=2, H=16, layers=2, **fields)
  model = Transformer(config, ComputeConfig(dtype=dtype))
  draw = np.random.default_rng(0)
  ids_BT, targets_BT = (draw.integers(0, 512, (4, 16)).astype(np.int32) for _ in range(2))

  @jax.jit
  def both(key, ids_BT, targets_BT):
    params = jax.tree.map(lambda w: 3 * w, model.init(key))  # logits of a trained model's size
    logits_BTV = model.apply(params, ids_BT)
    states_BTD = model.apply(params, ids_BT, logits=False)
    logprobs_BT, _ = token_logprobs(states_BTD, model.head(params), targets_BT)
    return logits_BTV, logprobs_BT

  if mesh is None:
    logits_BTV, logprobs_BT = both(jax.random.key(0), ids_BT, targets_BT)
  else:
    with jax.set_mesh(make_mesh(mesh)):
      placed = [shard(jnp.asarray(x), "batch", None) for x in (ids_BT, targets_BT)]
      logits_BTV, logprobs_BT = both(jax.random.key(0), *placed)
  chex.assert_type([logits_BTV, logprobs_BT], jnp.float32)
  all_BTV = jax.nn.log_softmax(np.asarray(logits_BTV))
  want_BT = np.take_along_axis(np.asarray(all_BTV), targets_BT[..., None], axis=2)[..., 0]
  assert np.ptp(want_BT) > 3
  np.testing.assert_allclose(logprobs_BT, want_BT, rtol=0, atol=tolerance)


FEW, OTHER = (
  decoder(V=T, D=16, F=F, N=4, K=2, H=4, layers=1, windows=(window,)).pattern[0]
  for F, window in ((24, None), (40, 5))
)
UNEVEN = ModelConfig(
  V=T, D=16, layers=9, prefix=(OTHER, OTHER), pattern=(FEW, OTHER), remainder=(FEW,)
)


def run_by_hand(model, params, ids_BT, split):
  """The logits by `embed`, `run_stack` and `finish`; the stack of index 1 in two slices."""
  context = Context(jnp.arange(ids_BT.shape[1])[None], in_order=True)
  x_BTD = model.embed(params, ids_BT)
  for index in range(len(model.config.stacks)):
    stack = params["stacks"][str(index)]
    slices = [slice(0, split), slice(split, None)] if index == 1 else [slice(None)]
    for part in slices:
      layers = jax.tree.map(lambda w, part=part: w[part], stack)
      x_BTD, cache, _ = model.run_stack(index, layers, x_BTD, context)
      assert cache is None
  return model.finish(params, x_BTD)


@pytest.mark.parametrize("scan", [pytest.param("always", marks=pytest.mark.slow), "never"])
def test_apply_is_embed_the_stacks_and_finish_and_a_stack_is_its_slices(scan):
  model, params = Transformer(UNEVEN, ComputeConfig(scan=scan)), init(UNEVEN)
  ids_BT = np.random.default_rng(3).integers(0, T, (2, 12))
  want_BTV = jax.jit(model.apply)(params, ids_BT)
  got_BTV = jax.jit(run_by_hand, static_argnums=(0, 3))(model, params, ids_BT, 1)
  np.testing.assert_allclose(got_BTV, want_BTV, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_layers_run_in_their_order_however_many_stacks_there_are():
  """Twelve stacks, whose names as text sort otherwise: against the layers of one pattern."""
  order = (FEW, OTHER) * 6
  stacks = ModelConfig(V=T, D=16, layers=12, prefix=order)
  pattern = ModelConfig(V=T, D=16, layers=12, pattern=(FEW, OTHER))
  assert len(stacks.stacks) == 12
  params = init(stacks)
  layers = [params["stacks"][str(index)]["0"] for index in range(12)]
  repeats = {
    str(place): jax.tree.map(lambda *rows: np.concatenate(rows), *layers[place::2])
    for place in range(2)
  }
  ids_BT = np.random.default_rng(4).integers(0, T, (2, 12))
  want_BTV = logits(pattern, params | {"stacks": {"0": repeats}}, ids_BT)
  np.testing.assert_allclose(logits(stacks, params, ids_BT), want_BTV, rtol=0, atol=1e-5)


IDS = np.zeros((2, 8), np.int32)


@pytest.mark.parametrize(
  "ids, options, message",
  [
    (IDS[0], {}, r"ids_BT.shape=\(8,\): must be \(any, any\)"),
    (IDS.astype(np.float32), {}, "ids_BT.dtype='float32': must be integer"),
    (IDS, {"positions": IDS[:, :1]}, r"positions.shape=\(2, 1\): must be \(any, 8\)"),
    (IDS, {"segment_ids": np.zeros((3, 8), int)}, r"segment_ids.shape=\(3, 8\): must have 1 or 2"),
    (IDS, {"segment_ids": np.zeros((1, 8))}, "segment_ids.dtype='float64': must be integer"),
  ],
)
def test_rows_that_do_not_fit_are_named(ids, options, message):
  model = Transformer(SMALL)
  params = jax.eval_shape(model.init, jax.random.key(0))
  with pytest.raises(UserError, match=message):
    jax.eval_shape(lambda params: model.apply(params, ids, **options), params)


def test_the_size_of_the_program_does_not_grow_with_depth():
  """What is compiled is one block per stack, forward and backward."""

  def lines(config):
    model = Transformer(config, ComputeConfig(scan="always"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    gradient = jax.grad(lambda params: model.apply(params, np.zeros((1, 8), np.int32)).sum())
    return len(jax.jit(gradient).lower(params).as_text().splitlines())

  shallow = ModelConfig(V=T, D=16, layers=4, pattern=(FEW,))
  base, deep = lines(shallow), lines(revise(shallow, layers=32))
  uneven = lines(ModelConfig(V=T, D=16, layers=61, prefix=(OTHER,) * 3, pattern=(FEW,)))
  assert abs(deep - base) < 0.02 * base and uneven < 2 * base
