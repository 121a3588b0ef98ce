"""The libraries' kernels: splash interpreted and compiled for TPUs, cuDNN lowered for Hopper."""

# B batch, T positions, N query heads, K key heads, H width of queries and keys, U width of values
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import api, attention, cudnn
from pallas_kernels.common import platform as common_platform

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

CASES = {
  "grouped": dict(T=128, S=128, N=4, K=2, H=16),
  "packed, window, cap": dict(T=256, S=256, N=2, K=1, packed=True, window=100, cap=2.0, size=3),
  "wider values, scale": dict(T=384, S=384, U=24, scale=0.5),
  "both directions, packed": dict(T=256, S=256, causal=False, packed=True),
}


@pytest.mark.parametrize("case", ["grouped"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_splash_interpreted_is_the_reference(
  case, with_lse, run, arrays_of, tokens_of, assert_close
):
  *arrays, do_BTNU, dlse_BTN = arrays_of(CASES[case])
  names = ("causal", "window", "cap", "scale")
  options = {name: CASES[case][name] for name in names if name in CASES[case]}
  options |= tokens_of(CASES[case]) | {"return_lse": with_lse}

  @jax.jit
  def attend(arrays, cotangents):
    returned, pull = jax.vjp(
      functools.partial(attention, implementation="splash", interpret=True, **options), *arrays
    )
    return *(returned if with_lse else [returned]), *pull(cotangents)

  names = ("o", "lse", "dq", "dk", "dv") if with_lse else ("o", "dq", "dk", "dv")
  got = dict(zip(names, attend(arrays, (do_BTNU, dlse_BTN) if with_lse else do_BTNU)))
  want = run(CASES[case], "reference", (*arrays, do_BTNU, dlse_BTN if with_lse else 0 * dlse_BTN))
  assert_close(got, {name: want[name] for name in got}, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_splash_interpreted(case, with_lse, run, arrays_of, tokens_of, assert_close):
  test_splash_interpreted_is_the_reference(case, with_lse, run, arrays_of, tokens_of, assert_close)


def shapes(T, N, K, H, U=None, B=1, dtype=jnp.bfloat16):
  U = U or H
  return [
    jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, T, N, H), (B, T, K, H), (B, T, K, U))
  ]


def loss(q_BTNH, k_BTKH, v_BTKU, segment_ids_BT=None, **options):
  returned = attention(q_BTNH, k_BTKH, v_BTKU, q_segment_ids_BT=segment_ids_BT, **options)
  return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(returned))


# the presets' heads, and what they do not have
ON_TPU = {
  "llama": (shapes(4096, 4, 1, 128), {}),
  "qwen, packed": (shapes(4096, 7, 1, 64), {}),
  "gemma, windowed layer": (shapes(8192, 2, 1, 256), dict(window=4096, cap=50.0)),
  "narrow heads, float32": (shapes(256, 4, 4, 32, dtype=jnp.float32), {}),
  "other widths, logsumexp": (shapes(384, 2, 1, 80, 96), dict(return_lse=True)),
}


# one case for every chip, and every case for a chip
COMPILED = [("llama", chip) for chip in ("v5e", "v5p", "v6e", "tpu7x")]
COMPILED += zip(list(ON_TPU)[1:], ("v5e", "v5p", "v6e", "tpu7x"))


@pytest.mark.slow
@pytest.mark.parametrize("case, chip", COMPILED)
def test_splash_compiles_for_tpus(case, chip):
  pytest.importorskip("libtpu")
  from pallas_kernels.schedule.compiler import compile_for

  arrays, options = ON_TPU[case]
  if "packed" in case:
    arrays = [*arrays, jax.ShapeDtypeStruct(arrays[0].shape[:2], jnp.int32)]
  gradients = jax.grad(functools.partial(loss, implementation="splash", **options), (0, 1, 2))
  program = compile_for(gradients, tuple(arrays), chip)
  assert program.as_text().count('custom_call_target="tpu_custom_call"') >= 3
  _, T, N, _ = arrays[0].shape
  if T > 1024:
    assert program.memory_analysis().temp_size_in_bytes < N * T * T  # no [T, T] array


@pytest.mark.slow
def test_splash_runs_on_every_device_of_a_mesh():
  pytest.importorskip("libtpu")
  from pallas_kernels.schedule.compiler import chip_mesh

  mesh = chip_mesh("v5e", (2, 2), ("data", "tensor"))
  sharding = NamedSharding(mesh, P("data", None, "tensor", None))
  arrays = [
    jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in shapes(256, 4, 2, 128, B=4)
  ]
  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile().as_text()
  assert program.count('custom_call_target="tpu_custom_call"') >= 3
  assert not re.findall(r"\b(all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program)


ON_GPU = {
  "grouped": ({}, "fmhaSoftmax"),
  "window": (dict(window=64), "fmhaSoftmax"),
  "packed": (dict(packed=True), "fmhaScaleBiasSoftmax"),
}


@pytest.mark.parametrize("case", ON_GPU)
def test_cudnn_lowers_for_hopper(case, monkeypatch):
  """There is no GPU here: platform, and what jax asks cuDNN for, is told instead."""
  from jax._src.cudnn import fused_attention_stablehlo as library

  for module in (common_platform, api, cudnn):
    monkeypatch.setattr(module, "platform", lambda: "gpu")
  monkeypatch.setattr(cudnn, "has_cudnn", lambda: True)
  monkeypatch.setattr(library, "check_cudnn_version", lambda: 91100)
  monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
  keywords, call = ON_GPU[case]
  options = {name: value for name, value in keywords.items() if name != "packed"}
  arrays = shapes(256, 4, 2, 64, B=2)
  if "packed" in keywords:
    arrays = [*arrays, jax.ShapeDtypeStruct((2, 256), jnp.int32)]
  gradients = jax.jit(jax.grad(functools.partial(loss, **options), (0, 1, 2)))
  program = gradients.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
  assert re.findall(r"@__cudnn\$(\w+)", program) == [call, f"{call}Backward"]
  assert program.count("mask_type\\22: \\22CAUSAL") == 2
  windows = re.findall(r"sliding_window_length\\22: (\d+)", program)
  assert windows == [str(options.get("window", 0))] * 2
