"""Lists the kernels that the report covers, at the shapes that they are judged by."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.matmul import matmul
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)

from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.schedule.case import Case, array
from pallas_kernels.schedule.compiler import chip_mesh
from pallas_kernels.schedule.delta_cases import delta_attention_cases
from pallas_kernels.schedule.fp8_cases import fp8_cases
from pallas_kernels.schedule.quantized_cases import quantized_cases
from pallas_kernels.schedule.sparse_cases import sparse_cases

# Gemma 2 2B with a batch of 8192 tokens, the shape of Table 1 of arXiv 2411.09009
TOKENS, WIDTH, VOCABULARY = 8192, 2304, 256_000


def cases() -> Iterator[Case]:
  """Yields this project's kernels, JAX's own and, where installed, tokamax's at the same shapes."""
  yield from linear_cross_entropy_cases(
    "linear_cross_entropy",
    linear_cross_entropy_loss,
    classifier=(VOCABULARY, WIDTH),
    kernel="backward",
  )
  yield from fp8_cases()
  yield from quantized_cases()
  yield from delta_attention_cases()
  yield from sparse_cases()
  yield matmul_case()
  yield splash_case()
  yield megablox_case()
  if importlib.util.find_spec("tokamax") is not None:
    yield from tokamax_cases()


def linear_cross_entropy_loss(
  embeddings_ND: jax.Array, classifier_VD: jax.Array, labels_N: jax.Array
) -> jax.Array:
  """Returns the mean loss of this project's TPU kernels."""
  return linear_cross_entropy(embeddings_ND, classifier_VD, labels_N, implementation="pallas_tpu")


def tokamax_loss(
  embeddings_ND: jax.Array, classifier_DV: jax.Array, labels_N: jax.Array
) -> jax.Array:
  """Returns the loss of tokamax's TPU kernels."""
  loss = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
  return loss(embeddings_ND, labels_N, classifier_DV, implementation="mosaic_tpu")


def with_tpu_as_default(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Traces `fn` with a TPU as the default device, without which tokamax refuses."""

  def wrapped(*args: Any) -> Any:
    with jax.default_device(chip_mesh("v5e").devices.flat[0]):
      return fn(*args)

  return wrapped


def tokamax_cases() -> Iterator[Case]:
  """Yields tokamax's kernels at the shapes of this project's."""
  name = "tokamax linear_cross_entropy"
  for case in linear_cross_entropy_cases(
    name, tokamax_loss, classifier=(WIDTH, VOCABULARY), kernel="bwd"
  ):
    yield dataclasses.replace(case, fn=with_tpu_as_default(case.fn))


def linear_cross_entropy_cases(
  name: str, loss: Callable[..., jax.Array], *, classifier: tuple[int, int], kernel: str
) -> Iterator[Case]:
  """Yields the forward kernel and, of the gradient's program, the kernel that `kernel` names."""
  args = (array(TOKENS, WIDTH), array(*classifier), array(TOKENS, dtype=jnp.int32))
  product = 2.0 * TOKENS * WIDTH * VOCABULARY
  shape = f"{TOKENS} x {WIDTH} x {VOCABULARY} bf16"
  gradients = jax.grad(loss, (0, 1))
  yield Case(name=f"{name}, forward", shape=shape, fn=loss, args=args, flops=product)
  yield Case(
    name=f"{name}, backward",
    shape=shape,
    fn=gradients,
    args=args,
    flops=3 * product,
    kernel=kernel,
  )


def matmul_case() -> Case:
  """Returns the case of JAX's example of a matrix product."""
  size = 8192
  fn = functools.partial(matmul, block_shape=(1024, 1024), block_k=512)
  return Case(
    name="jax matmul",
    shape=f"{size} cubed bf16",
    fn=fn,
    args=(array(size, size),) * 2,
    flops=2.0 * size**3,
  )


def splash_case() -> Case:
  """Returns the case of JAX's splash attention, forward."""
  heads, length, width = 8, 4096, 128
  mask = splash_attention_mask.MultiHeadMask(
    [splash_attention_mask.CausalMask((length, length))] * heads
  )
  sizes = splash_attention_kernel.BlockSizes(block_q=1024, block_kv=1024, block_kv_compute=512)
  kernel = splash_attention_kernel.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
  )
  return Case(
    name="jax splash attention, forward",
    shape=f"{heads} heads x {length} x {width} causal bf16",
    fn=lambda q_NTH, k_NTH, v_NTH: kernel(q_NTH, k_NTH, v_NTH),
    args=(array(heads, length, width),) * 3,
    flops=2.0 * heads * length * length * width,
  )


def megablox_case() -> Case:
  """Returns the case of JAX's grouped matrix product."""
  rows, inner, outer, groups = 8192, 2048, 2048, 8
  sizes = jnp.full(groups, rows // groups, jnp.int32)
  return Case(
    name="jax megablox gmm",
    shape=f"{rows} rows x {inner} x {outer}, {groups} equal groups bf16",
    fn=lambda x, w, sizes: gmm(x, w, sizes, tiling=(512, 1024, 1024)),
    args=(array(rows, inner), array(groups, inner, outer), sizes),
    flops=2.0 * rows * inner * outer,
  )
