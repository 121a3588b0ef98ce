"""What the operation refuses and names, its choice of implementation, its memory on CPU."""

# N tokens, D model, V vocabulary
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import pallas_kernels
from pallas_kernels.common.errors import UserError
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.api import choose
from pallas_kernels.linear_cross_entropy.terms import Inputs, Options

GOOD = dict(
  embeddings_ND=jnp.ones((4, 3)), classifier_VD=jnp.ones((5, 3)), labels_N=jnp.zeros(4, jnp.int32)
)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      dict(embeddings_ND=jnp.ones((2, 2, 3))),
      r"embeddings_ND.shape=\(2, 2, 3\): must be \(any, any\)",
    ),
    (dict(classifier_VD=jnp.ones((5, 4))), r"classifier.shape=\(5, 4\): must be \(5, 3\)"),
    (dict(classifier_layout="dv"), r"classifier.shape=\(5, 3\): must be \(3, 3\)"),
    (dict(classifier_VD=jnp.ones((0, 3))), "V and D must be at least 1"),
    (dict(labels_N=jnp.zeros(3, jnp.int32)), r"labels_N.shape=\(3,\): must be \(4,\)"),
    (dict(labels_N=jnp.zeros(4)), "labels_N.dtype='float32': must be integer"),
    (dict(bias_V=jnp.ones(4)), r"bias_V.shape=\(4,\): must be \(5,\)"),
    (dict(bias_V=jnp.ones(5, jnp.int32)), "bias_V.dtype='int32'"),
    (dict(weights_N=jnp.ones(5)), r"weights_N.shape=\(5,\): must be \(4,\)"),
    (dict(weights_N=jnp.ones(4, bool)), "weights_N.dtype='bool': must be floating"),
    (
      dict(embeddings_ND=jnp.ones((4, 3), jnp.int32)),
      "embeddings_ND.dtype='int32': must be floating",
    ),
    (
      dict(classifier_VD=jnp.ones((5, 3), jnp.bfloat16)),
      "classifier.dtype='bfloat16': must be float32",
    ),
    (dict(softcap=0.0), "softcap=0.0"),
    (dict(softcap=-1), "softcap=-1"),
    (dict(temperature=0), "temperature=0: must be above 0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(label_smoothing=1.0), r"label_smoothing=1.0: must lie in \[0, 1\)"),
    (dict(label_smoothing=-0.1), "label_smoothing=-0.1"),
    (dict(z_loss=-1.0), "z_loss=-1.0: must be at least 0"),
    (dict(reduction="avg"), "reduction='avg': must be one of 'mean', 'sum', 'none'"),
    (dict(classifier_layout="VD"), "classifier_layout='VD'"),
    (
      dict(implementation="cuda"),
      "implementation='cuda': must be one of None, 'reference', 'xla', 'pallas_tpu'",
    ),
    (dict(filter_e="Auto"), "filter_e='Auto'"),
    (dict(implementation="pallas_tpu", interpret=3), "interpret=3 is neither True nor pltpu"),
    (dict(interpret=True), "interpret=True: needs implementation= one of"),
    (dict(labels_N=jnp.full(4, 5, jnp.int32)), r"labels lie in \[0, 5\)"),
  ],
)
def test_bad_input_is_named(change, message):
  with pytest.raises(UserError, match=message):
    linear_cross_entropy(**{**GOOD, **change})


def test_a_traced_option_is_refused():
  with pytest.raises(ValueError, match="temperature=.*known when traced"):
    jax.jit(lambda t: linear_cross_entropy(**GOOD, temperature=t))(1.0)


@pytest.mark.parametrize(
  ("implementation", "message"),
  [("pallas_tpu", "not a TPU; interpret=True or"), ("pallas_gpu", "bfloat16 and float16")],
)
def test_a_named_implementation_that_cannot_run_says_why(implementation, message):
  with pytest.raises(NotImplementedError, match=message):
    linear_cross_entropy(**GOOD, implementation=implementation)


def test_tpu_refuses_float16():
  half = {name: a.astype(jnp.float16) for name, a in GOOD.items() if name != "labels_N"}
  with pytest.raises(NotImplementedError, match="float16"):
    linear_cross_entropy(
      **half, labels_N=GOOD["labels_N"], implementation="pallas_tpu", interpret=True
    )


@pytest.mark.parametrize(
  ("device", "V", "devices", "chosen"),
  [
    ("TPU v5 lite", 32_000, 1, "pallas_tpu"),
    ("TPU v5 lite", 32_000, 4, "pallas_tpu"),
    ("TPU v5 lite", 256, 1, "xla"),
    ("NVIDIA H200", 32_000, 1, "pallas_gpu"),
    ("NVIDIA H200", 32_000, 2, "xla"),
    ("NVIDIA H200", 256, 1, "xla"),
    ("NVIDIA H200", 50_257, 1, "xla"),
    ("NVIDIA A100-SXM4-80GB", 32_000, 1, "xla"),
  ],
)
@pytest.mark.parametrize("layout", ["vd", "dv"])
def test_default_by_platform_and_size(device, V, devices, chosen, layout):
  platform = "tpu" if "TPU" in device else "gpu"
  abstract = AbstractDevice(device_kind=device, num_cores=1, platform=platform)
  mesh = AbstractMesh((devices,), ("x",), abstract_device=abstract)
  with jax.sharding.use_abstract_mesh(mesh):
    inputs = Inputs(
      jax.ShapeDtypeStruct((256, 128), jnp.bfloat16),
      jax.ShapeDtypeStruct((V, 128) if layout == "vd" else (128, V), jnp.bfloat16),
      jax.ShapeDtypeStruct((256,), jnp.int32),
      None,
    )
    assert choose(None, inputs, Options(vocabulary=V, layout=layout)) == chosen


def temp_bytes(fn, *shapes):
  arrays = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
  return jax.jit(fn).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_memory_on_cpu():
  N, D, V = 2048, 32, 32_768
  shapes = ((N, D), jnp.float32), ((V, D), jnp.float32), ((N,), jnp.int32)
  logits, gradients = 4 * N * V, 4 * (N + V) * D
  assert temp_bytes(linear_cross_entropy, *shapes) < 12 * 2**20
  assert temp_bytes(jax.grad(linear_cross_entropy, (0, 1)), *shapes) < logits / 5
  two_passes = jax.grad(lambda *args: linear_cross_entropy(*args, reduction="none").sum(), (0, 1))
  assert temp_bytes(two_passes, *shapes) < gradients + 16 * 2**20


def test_lse_that_is_not_differentiated_costs_no_second_pass():
  """xla makes the gradients of a scalar loss in its forward pass; a gradient of lse costs more."""
  N, D, V = 256, 64, 8192
  arrays = [
    jax.ShapeDtypeStruct(*a)
    for a in (((N, D), jnp.float32), ((V, D), jnp.float32), ((N,), jnp.int32))
  ]

  def flops(use):
    def loss(*args):
      return use(
        *linear_cross_entropy(*args, reduction="sum", return_lse=True, implementation="xla")
      )

    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).as_text()
    return text.count("dot_general")

  plain = flops(lambda loss, lse_N: loss + 0 * jnp.sum(jax.lax.stop_gradient(lse_N)))
  assert plain == 3
  assert flops(lambda loss, lse_N: loss + jnp.sum(lse_N)) > plain


@pytest.mark.parametrize("biased, layout", [(False, "vd"), (True, "vd"), (False, "dv")])
def test_lowers_for_hopper(biased, layout):
  """Statistics and gradients of the GPU kernel, without anything that this jax deprecates."""
  N, D, V = 1024, 256, 4096
  device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  c = (V, D) if layout == "vd" else (D, V)
  shapes = ((N, D), jnp.bfloat16), (c, jnp.bfloat16), ((N,), jnp.int32), ((V,), jnp.float32)
  arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  options = dict(softcap=30.0, classifier_layout=layout, implementation="pallas_gpu")

  def loss(e_ND, c, labels_N, bias_V):
    return linear_cross_entropy(e_ND, c, labels_N, bias_V=bias_V if biased else None, **options)

  with (
    jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)),
    warnings.catch_warnings(action="error", category=DeprecationWarning),
  ):
    lowered = jax.jit(jax.grad(loss, (0, 1))).trace(*arrays).lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match="must be multiples of 256, 128 and 64"):
      ragged = [jax.ShapeDtypeStruct((100, *a.shape[1:]), a.dtype) for a in (arrays[0], arrays[2])]
      jax.eval_shape(loss, ragged[0], arrays[1], ragged[1], arrays[3])
  assert lowered.as_text().count("mosaic_gpu") >= 2


def test_a_scalar_loss_on_xla_passes_three_files_of_its_folder():
  """From the public function to the arithmetic; and of what all operations share, three more."""
  package = pathlib.Path(pallas_kernels.__file__).parent
  codes = set()

  def record(frame, event, _):
    if event == "call" and frame.f_code.co_name != "<module>":
      codes.add(frame.f_code)

  def loss(e_ND):
    return linear_cross_entropy(**{**GOOD, "embeddings_ND": e_ND})

  sys.setprofile(record)
  try:
    jax.eval_shape(jax.grad(loss), GOOD["embeddings_ND"])
  finally:
    sys.setprofile(None)
  paths = {pathlib.Path(code.co_filename) for code in codes}
  called = {str(path.relative_to(package)) for path in paths if path.is_relative_to(package)}
  own = {f"linear_cross_entropy/{name}.py" for name in ("api", "xla", "terms")}
  assert called == own | {f"common/{name}.py" for name in ("checks", "platform", "shards")}
