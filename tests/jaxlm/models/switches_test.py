"""Compares each switch of the model with a float64 decoder that loops over positions and heads."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import AttentionConfig, ComputeConfig, ModelConfig, decoder
from jaxlm.models import Transformer, roles
from jaxlm.objectives import next_token_loss
from jaxlm.train.accumulate import accumulated_gradients
from sharding import MeshConfig, make_mesh
from sharding.rules import shard

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

BASE = {"D": 16, "F": 24, "N": 4, "K": 2, "H": 6, "V": 40, "layers": 2}
REFERENCE = ComputeConfig(attention_implementation="reference")
GEMMA = {
  "windows": (5, None),
  "cap": 1.5,
  "logit_cap": 2.0,
  "query_width": 3.0,
}
GEMMA |= {
  "norm_offset": 1,
  "post_norms": True,
  "embed_scale": "root_width",
  "activation": "gelu_tanh",
  "tied": True,
}
BIASES = {"qkv_bias": True, "out_bias": True, "bias": True, "qk_norm": True}
SWITCHES = [
  {},
  {"qkv_bias": True},
  {"out_bias": True},
  {"bias": True},
  {"qk_norm": True},
  {"norm_offset": 1},
  {"post_norms": True},
  {"embed_scale": "root_width"},
  {"activation": "gelu"},
  {"activation": "gelu_tanh"},
  {"query_width": 3.0},
  {"cap": 1.5},
  {"logit_cap": 2.0},
  {"windows": (5, None)},
  {"tied": True},
  GEMMA | BIASES,
]
IDS = np.random.default_rng(0).integers(0, 40, (2, 12))


@functools.cache
def random_params(config):
  """Weights, biases and norms all drawn at random, so that none hides behind a zero or a one."""
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  draw = np.random.default_rng(1)
  return jax.tree.map(lambda x: (0.4 * draw.normal(size=x.shape)).astype(np.float32), shapes)


def plain_decoder(c, params, ids_T):
  """Returns logits [T, V] of one row."""
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  m, activation = c.layer_specs[0].mixer, c.layer_specs[0].feedforward.activation

  def norm(x, weights):
    return (c.norm_offset + weights["weight"]) * x / math.sqrt(np.mean(x * x) + c.norm_eps)

  def gelu(x):
    if activation == "gelu":
      return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

  def act(x):
    return x / (1 + np.exp(-x)) if activation == "silu" else gelu(x)

  def cap(x, limit):
    return x if limit is None else limit * math.tanh(x / limit)

  def rotate(x, position):
    half = m.H // 2
    angles = [position * m.rope.theta ** (-2 * j / m.H) for j in range(half)]
    turned = [x[j] * math.cos(a) - x[j + half] * math.sin(a) for j, a in enumerate(angles)]
    return np.array(
      turned + [x[j + half] * math.cos(a) + x[j] * math.sin(a) for j, a in enumerate(angles)]
    )

  def project(x, w, name):
    y = x @ w[name]["weight"]
    return y + w[name]["bias"] if "bias" in w[name] else y

  def heads(x, w, name, t):
    parts = project(x, w, name).reshape(-1, m.H)
    if name == "v":
      return parts
    if m.qk_norm:
      parts = [norm(part, w[f"{name}_norm"]) for part in parts]
    return [rotate(part, t) for part in parts]

  def attention(xs, w, window):
    q, k, v = ([heads(x, w, name, t) for t, x in enumerate(xs)] for name in "qkv")
    outs = []
    for t in range(len(xs)):
      seen = range(max(0, t - window + 1) if window else 0, t + 1)
      mixed = []
      for n in range(m.N):
        h = n // (m.N // m.K)
        scores = [cap(q[t][n] @ k[s][h] / math.sqrt(m.query_width or m.H), m.cap) for s in seen]
        shares = np.exp(scores) / np.sum(np.exp(scores))
        mixed.append(sum(share * v[s][h] for share, s in zip(shares, seen)))
      outs.append(project(np.concatenate(mixed), w, "o"))
    return outs

  xs = [
    p["embed"]["weight"][i] * (math.sqrt(c.D) if c.embed_scale == "root_width" else 1)
    for i in ids_T
  ]
  for layer in range(c.layers):
    place, row = layer % len(c.pattern), layer // len(c.pattern)
    w = jax.tree.map(lambda w, row=row: w[row], p["stacks"]["0"][str(place)])
    window = c.pattern[place].mixer.window
    mixed = attention([norm(x, w["mixer_norm"]) for x in xs], w["mixer"], window)
    if c.post_norms:
      mixed = [norm(y, w["mixer_post_norm"]) for y in mixed]
    xs = [x + y for x, y in zip(xs, mixed)]
    for t, x in enumerate(xs):
      u, f = norm(x, w["feedforward_norm"]), w["feedforward"]
      fed = project(act(project(u, f, "gate")) * project(u, f, "up"), f, "down")
      xs[t] = x + (norm(fed, w["feedforward_post_norm"]) if c.post_norms else fed)
  head = p["embed"]["weight"].T if c.tied else p["head"]["weight"]
  return np.array([[cap(logit, c.logit_cap) for logit in norm(x, p["norm"]) @ head] for x in xs])


@pytest.mark.parametrize("fields", SWITCHES, ids=lambda fields: "-".join(fields)[:40] or "none")
def test_against_the_plain_decoder(fields):
  config = decoder(**BASE | fields)
  params = random_params(config)
  want = np.stack([plain_decoder(config, params, row) for row in IDS])
  np.testing.assert_allclose(
    Transformer(config, REFERENCE).apply(params, IDS), want, rtol=0, atol=2e-5 * np.abs(want).max()
  )


ROLES = ("norm", "bias")


@pytest.mark.parametrize("offset", [0, 1])
def test_fresh_norms_multiply_by_one_and_fresh_biases_add_nothing(offset):
  config = decoder(**BASE, norm_offset=offset, post_norms=True, **BIASES)
  fresh = Transformer(config).init(jax.random.key(0))
  leaves = list(zip(jax.tree.leaves(roles(config)), map(np.asarray, jax.tree.leaves(fresh))))
  found = {role: {w.item() for r, leaf in leaves if r == role for w in leaf.flat} for role in ROLES}
  assert found == {"norm": {1 - offset}, "bias": {0}}


@pytest.mark.parametrize("prefilled", [1, 5])
def test_cached_decoding_equals_the_full_pass(prefilled):
  """With window, soft caps, norms of queries and keys, and biases; one compiled step for all."""
  config = decoder(**BASE, **GEMMA, **BIASES)
  params = random_params(config)
  model = Transformer(config, REFERENCE)
  full_BTV = model.apply(params, IDS)
  cached = jax.jit(model.apply)
  cache = model.init_cache(len(IDS), IDS.shape[1])

  def positions(start, stop):
    return jnp.broadcast_to(jnp.arange(start, stop)[None], (len(IDS), stop - start))

  part_BTV, cache = cached(
    params, IDS[:, :prefilled], positions=positions(0, prefilled), cache=cache
  )
  parts = [part_BTV]
  for t in range(prefilled, IDS.shape[1]):
    part_BTV, cache = cached(params, IDS[:, t : t + 1], positions=positions(t, t + 1), cache=cache)
    parts.append(part_BTV)
  np.testing.assert_allclose(np.concatenate(parts, axis=1), full_BTV, rtol=0, atol=1e-5)


MESHES = [
  pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),
  pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
  pytest.param(MeshConfig(data=1, fsdp=4, tensor=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh", MESHES, ids=MeshConfig.describe)
def test_gradients_of_every_switch_on_a_mesh(mesh):
  """Biases and norms sum their gradients over devices exactly once, with micro-batches too."""
  config = decoder(**BASE | {"H": 8} | GEMMA | BIASES)
  ids_BT = np.random.default_rng(4).integers(0, 40, (16, 8))
  params = random_params(config)
  model = Transformer(config, REFERENCE)

  def gradients(params, ids_BT):
    def objective(params, ids_BT, key):
      weights_BT = jnp.ones_like(ids_BT, jnp.float32)
      states_BTD = model.apply(params, ids_BT, logits=False)
      return next_token_loss(states_BTD, model.head(params), ids_BT, weights_BT)

    ids_BT = shard(jnp.asarray(ids_BT), "batch", None)
    grads, terms = accumulated_gradients(objective, params, ids_BT, jax.random.key(0), 2)
    return grads, terms["loss"].mean()

  want, want_loss = jax.jit(gradients)(params, ids_BT)
  with jax.set_mesh(make_mesh(mesh)):
    shardings = jax.eval_shape(model.init, jax.random.key(0))
    placed = jax.tree.map(
      lambda w, like: jax.device_put(w, jax.typeof(like).sharding.spec), params, shardings
    )
    got, got_loss = jax.jit(gradients)(placed, ids_BT)
  assert float(got_loss) == pytest.approx(float(want_loss), rel=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(
      a, b, rtol=0, atol=2e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize(
  "fields, rule",
  [
    ({"norm_offset": 2}, "model.norm_offset=2: must be 0 or 1"),
    ({"logit_cap": 0.0}, "model.logit_cap=0.0: must be above 0"),
    ({"max_length": 0}, "model.max_length=0: must be above 0"),
  ],
)
def test_rules(fields, rule):
  with pytest.raises(ValueError, match=rule):
    ModelConfig(**fields)


@pytest.mark.parametrize(
  "fields, rule",
  [
    ({"query_width": 0.0}, "mixer.query_width=0.0: must be above 0"),
    ({"cap": -1.0}, "mixer.cap=-1.0: must be above 0"),
    ({"window": 0}, "mixer.window=0: must be above 0"),
  ],
)
def test_rules_of_attention(fields, rule):
  with pytest.raises(ValueError, match=rule):
    AttentionConfig(**fields)
