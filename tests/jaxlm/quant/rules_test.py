"""Rules give formats to matmuls by name: in scans, in both passes, on a mesh, and in the table."""

import copy
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (
  ComputeConfig,
  DataConfig,
  MeshConfig,
  QuantRule,
  QuantSpec,
  TrainConfig,
  decoder,
)
from jaxlm.config.formats import UniformFormat
from jaxlm.config.quant import BlockwiseProduct, EmulatedProduct, find_spec
from jaxlm.config_json import from_dict, to_dict
from jaxlm.data.packing import Batch
from jaxlm.models import Transformer
from jaxlm.models.linear import Linear
from jaxlm.models.parts import list_matmuls
from jaxlm.quant import uniform
from jaxlm.quant.describe import describe
from jaxlm.quant.first_step import check_probes, probe
from jaxlm.recipes import load_rules
from jaxlm.run.text import TextTask
from jaxlm.train.accumulate import accumulated_gradients
from pallas_kernels.common.errors import UnsupportedError, UserError
from sharding import make_mesh
from sharding.batches import globalize

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

INT4, INT8 = UniformFormat(), UniformFormat(bits=8)
W4 = QuantSpec(weight=INT4)
SMALL = decoder(V=32, D=16, F=24, N=4, K=2, H=4, layers=4)
INNER = (QuantRule(match=r"layers[.](0|3)[.].*"), QuantRule(match="layers.*", spec=W4))


def with_rules(*rules, **fields):
  return dataclasses.replace(SMALL, quant=rules, **fields)


def test_the_first_rule_that_matches_the_whole_name_decides():
  rules = (QuantRule(match="layers[.]0[.].*"), QuantRule(match="layers.*", spec=W4))
  assert find_spec(rules, "layers.0.mixer.q").is_plain
  assert find_spec(rules, "layers.10.mixer.q") == W4
  assert find_spec(rules, "head").is_plain


@pytest.mark.parametrize(
  "rules, rule",
  [
    ([QuantRule(match="layers[.]7.*", spec=W4)], "quant.0"),
    ([QuantRule(match="layer", spec=W4)], "quant.0"),
    ([QuantRule(match="layers.*", spec=W4), QuantRule(match=".*mixer[.]q")], "quant.1"),
  ],
)
def test_a_rule_that_decides_no_matmul_is_refused(rules, rule):
  with pytest.raises(UserError, match=rule):
    list_matmuls(with_rules(*rules))


def test_a_bad_expression_and_formats_beside_a_product_are_refused():
  with pytest.raises(UserError, match="regular expression"):
    QuantRule(match="layers[")
  with pytest.raises(UserError, match="formats of its own"):
    QuantSpec(weight=INT4, product=EmulatedProduct(weight=INT4))


@jax.jit
def quantize_inner(params):
  """Rounds all weights of the layers 1 and 2 of SMALL, as its rules INNER do."""

  def leaf(path, w):
    if path[0].key != "stacks" or w.ndim < 3:
      return w
    rounded = uniform.quantize(w.swapaxes(1, 2), INT4).swapaxes(1, 2)
    return w.at[1:3].set(rounded[1:3])

  return jax.tree_util.tree_map_with_path(leaf, params)


def loss_and_grads(config, compute, params):
  model = Transformer(config, compute)
  ids_BT = jnp.arange(12)[None]
  return jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.apply(p, ids_BT) ** 2)))(params)


@functools.cache
def rounded_beforehand():
  params = Transformer(SMALL).init(jax.random.key(0))
  rounded = quantize_inner(params)
  return params, rounded, loss_and_grads(SMALL, ComputeConfig(scan="always"), rounded)


@pytest.mark.parametrize("scan", [pytest.param("never", marks=pytest.mark.slow), "always"])
def test_rules_tell_the_layers_of_one_stack_apart(scan):
  """The same as a plain model whose weights are rounded beforehand, gradients included."""
  params, rounded, want = rounded_beforehand()
  q = [tree["stacks"]["0"]["0"]["mixer"]["q"]["weight"] for tree in (params, rounded)]
  assert np.abs(q[0] - q[1]).max() > 0.01
  got = loss_and_grads(with_rules(*INNER), ComputeConfig(scan=scan), params)
  chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-5)


def test_a_slice_of_a_stack_cannot_tell_layers_apart():
  model = Transformer(with_rules(*INNER))
  params = jax.eval_shape(model.init, jax.random.key(0))
  part = jax.tree.map(lambda w: jax.ShapeDtypeStruct((2, *w.shape[1:]), w.dtype), params["stacks"])
  x_BTD, context = jnp.zeros((1, 4, 16)), model.context(4, None, None, False, "contiguous")
  with pytest.raises(UnsupportedError, match="tell layers apart"):
    jax.eval_shape(lambda stack: model.run_stack(0, stack["0"], x_BTD, context), part)


def run_linear(spec, x_BTD, w_DF, dy_BTF):
  """Returns y, dx and dw of one matmul under a spec."""
  D, F = w_DF.shape
  rules = (QuantRule(match=".*", spec=spec),)
  names = (None, None), ("batch", "length", None)
  linear = Linear((D, F), 1.0, *names, ComputeConfig(), rules, parent=None)

  def run(x_BTD, w_DF):
    return linear.apply({"params": {"weight": w_DF}}, x_BTD)

  @jax.jit
  def passes(x_BTD, w_DF, dy_BTF):
    y_BTF, pull = jax.vjp(run, x_BTD, w_DF)
    return y_BTF, *pull(dy_BTF)

  return passes(x_BTD, w_DF, dy_BTF)


jitted_quantize = jax.jit(uniform.quantize, static_argnums=1)


def rounded(x, format, axis):
  return np.moveaxis(np.asarray(jitted_quantize(np.moveaxis(x, axis, -1), format)), -1, axis)


def operands():
  draw = np.random.default_rng(0)
  return [draw.normal(size=s).astype(np.float32) for s in ((2, 6, 8), (8, 5), (2, 6, 5))]


def test_formats_of_weight_input_and_gradient():
  x_BTD, w_DF, dy_BTF = operands()
  spec = QuantSpec(weight=INT4, activation=INT8, gradient=UniformFormat(bits=6))
  x, w, dy = rounded(x_BTD, INT8, 2), rounded(w_DF, INT4, 0), rounded(dy_BTF, spec.gradient, 2)
  want = x @ w, dy @ w.T, np.einsum("btd,btf->df", x, dy)
  chex.assert_trees_all_close(run_linear(spec, x_BTD, w_DF, dy_BTF), want, atol=1e-5)


def test_an_emulated_product_quantises_each_operand_along_the_axis_that_is_contracted():
  x_BTD, w_DF, dy_BTF = operands()
  product = EmulatedProduct(weight=INT4, activation=INT8, gradient=UniformFormat(bits=6))
  got = run_linear(QuantSpec(product=product), x_BTD, w_DF, dy_BTF)
  x = functools.partial(rounded, x_BTD, INT8)
  w = functools.partial(rounded, w_DF, INT4)
  dy = functools.partial(rounded, dy_BTF, product.gradient)
  want = x(2) @ w(0), dy(2) @ w(1).T, np.einsum("btd,btf->df", x(1), dy(1))
  chex.assert_trees_all_close(got, want, atol=1e-5)


def test_the_head_in_a_loss_has_its_formats():
  """What the loss multiplies is what makes logits; a gradient's format cannot act there."""
  config = with_rules(QuantRule(match="head", spec=QuantSpec(weight=INT4, activation=INT8)))
  model = Transformer(config)
  params = rounded_beforehand()[0]

  @jax.jit
  def run(params):
    x_BTD = model.embed(params, jnp.arange(8)[None])
    weight = model.head(params).weight
    return model.finish(params, x_BTD), model.finish(params, x_BTD, logits=False), weight

  logits_BTV, states_BTD, w_DV = run(params)
  chex.assert_trees_all_close(states_BTD @ w_DV, logits_BTV, atol=1e-5)
  chex.assert_trees_all_equal(w_DV, rounded(params["head"]["weight"], INT4, 0))
  config = with_rules(QuantRule(match="head", spec=QuantSpec(gradient=INT8)))
  with pytest.raises(UnsupportedError, match="head"):
    Transformer(config).head(params)


@pytest.mark.slow
def test_training_and_evaluation_run_the_same_forward_pass():
  """With the key of a training step, for a recipe that rounds gradients at random, and without."""
  plain = Transformer(decoder(V=32, D=16, F=32, N=2, K=2, H=8, layers=1))
  model = Transformer(dataclasses.replace(plain.config, quant=load_rules("nvfp4:8")))
  ids_BT = jnp.arange(8)[None]

  @jax.jit
  def run(key):
    params = model.init(key)
    both = model.apply(params, ids_BT, key=key), model.apply(params, ids_BT)
    return *both, plain.apply(params, ids_BT)

  training, evaluation, exact = run(jax.random.key(0))
  chex.assert_trees_all_equal(training, evaluation)
  assert np.abs(evaluation - exact).max() > 1e-3


def test_the_table_has_every_matmul_with_its_formats_forward_and_backward():
  spec = QuantSpec(weight=INT4, activation=INT8)
  table = describe(with_rules(QuantRule(match="layers[.][0-2][.]mixer.*", spec=spec)), "bfloat16")
  lines = {line.split()[0]: line for line in table[1:]}
  assert sum(len(m.names) for m in list_matmuls(SMALL)) == 4 * 7 + 1
  assert list(lines)[-1] == "head" and len(lines) == 4 * 2 + 3 + 1
  line = lines["layers.0-2.mixer.q"]
  assert "int8 symmetric per row * int4 symmetric per row" in line  # forward
  assert "bfloat16 * int4 symmetric per row" in line  # to the input
  assert "int8 symmetric per row * bfloat16" in line  # to the weight
  assert "bfloat16 * bfloat16" in lines["layers.3.mixer.q"]


def test_rules_survive_json():
  config = with_rules(*INNER, QuantRule(match="head", spec=QuantSpec(product=EmulatedProduct())))
  assert from_dict(type(config), to_dict(config)) == config


def test_a_zero_scale_and_a_zero_gradient_are_found_and_named():
  config = with_rules(*INNER)
  params = jax.tree.map(np.ones_like, jax.device_get(rounded_beforehand()[0]))
  params = {"stacks": params["stacks"]}
  jitted_probe = jax.jit(probe, static_argnums=0)

  def check(weights, gradients):
    check_probes(config, jax.device_get(jitted_probe(config, weights, gradients)))

  def with_zeros(index):
    changed = copy.deepcopy(params)
    changed["stacks"]["0"]["0"]["mixer"]["q"]["weight"][index] = 0
    return changed

  check(params, params)
  with pytest.raises(UserError, match=r"layers.2.mixer.q: a scale of its weight is zero"):
    check(with_zeros(np.s_[2, :, 3]), params)
  with pytest.raises(UserError, match=r"layers.1.mixer.q: the gradient of its weight is all zero"):
    check(params, with_zeros(1))
  check(with_zeros(0), with_zeros(0))  # a layer that is not quantised


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2)], ids=MeshConfig.describe)
def test_a_mesh_gives_the_numbers_of_one_device(mesh):
  spec = QuantSpec(weight=INT4, activation=INT8, gradient=INT8)
  product = EmulatedProduct(weight=INT4, activation=INT8, gradient=INT8)
  config = with_rules(
    QuantRule(match=".*mixer.*", spec=spec),
    QuantRule(match="layers.*", spec=QuantSpec(product=product)),
    QuantRule(match="head", spec=W4),
    QuantRule(match="cache.*keys", spec=QuantSpec(activation=INT8, hadamard=4)),
    QuantRule(match="cache.*", spec=QuantSpec(activation=INT8)),
  )
  train = TrainConfig(batch=8, model=config, data=DataConfig(length=16))
  task = TextTask(train)
  ids_BT = np.random.default_rng(0).integers(0, 32, (8, 17)).astype(np.int32)
  batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], np.ones((8, 16), np.float32))

  @jax.jit
  def gradients(params, batch):
    def objective(params, batch, key):
      return task.objective(params, {}, batch, key)

    return accumulated_gradients(objective, params, batch, jax.random.key(0), 2)

  def on(mesh):
    with jax.set_mesh(make_mesh(mesh)):
      params = jax.jit(task.init)(jax.random.key(0)).params
      return jax.device_get(gradients(params, globalize(batch, 8)))

  one, many = on(MeshConfig(data=1)), on(mesh)
  for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one)):
    # sums in another order move a few numbers over the edge between two codes
    assert np.linalg.norm(a - b) <= 3e-3 * np.linalg.norm(b)


def test_blockwise_codes_are_described_and_refused_where_the_chip_lacks_them():
  config = with_rules(*load_rules("fp8"))
  line = describe(config, "float32")[1]
  assert "e4m3fn 1x128 f32 * e4m3fn 128x128 f32" in line  # forward
  assert "e4m3fn 128x1 f32 * e4m3fn 128x1 f32" in line  # to the weight
  assert from_dict(type(config), to_dict(config)) == config
  with pytest.raises(UserError, match="product.save='fp8': needs scale=\"pow2\""):
    BlockwiseProduct(save="fp8")
  model, ids_BT = Transformer(config), jnp.zeros((1, 4), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0))
  with pytest.raises(UnsupportedError, match="allow_emulation=True"):
    jax.eval_shape(model.apply, params, ids_BT)
