"""Gives one loss in several libraries, each as a function that a benchmark times."""

# N tokens, D model, V vocabulary
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import linear_cross_entropy

Inputs = tuple[jax.Array, jax.Array, jax.Array]


class Arm(NamedTuple):
  """Holds `run()`, which returns [loss], or [loss, dE, dC] for `gradient`, when all is done."""

  run: Callable[[], list[jax.Array]]
  memory: Callable[[], int]
  """bytes in use during a run, beyond inputs and results"""


def materialised(
  embeddings_ND: jax.Array, classifier_VD: jax.Array, labels_N: jax.Array
) -> jax.Array:
  """Computes what a training loop writes without a fused loss."""
  x_NV = jnp.einsum("nd,vd->nv", embeddings_ND, classifier_VD, preferred_element_type=jnp.float32)
  target_N = jnp.take_along_axis(x_NV, labels_N[:, None], axis=1)[:, 0]
  return jnp.mean(jax.nn.logsumexp(x_NV, axis=1) - target_N)


def jax_arm(loss: Callable[..., jax.Array], inputs: Inputs, gradient: bool) -> Arm:
  compiled: Any = (
    jax.jit(jax.value_and_grad(loss, (0, 1)) if gradient else loss).lower(*inputs).compile()
  )
  memory = compiled.memory_analysis().temp_size_in_bytes
  return Arm(lambda: jax.block_until_ready(jax.tree.leaves(compiled(*inputs))), lambda: memory)


def torch_arm(loss: Callable[..., Any], inputs: Inputs, gradient: bool) -> Arm:
  """Times `loss(embeddings, classifier, labels)` of torch tensors in the memory of `inputs`."""
  torch = importlib.import_module("torch")
  e_ND, c_VD, labels_N = (torch.from_dlpack(array) for array in inputs)
  labels_N = labels_N.long()
  for tensor in (e_ND, c_VD):
    tensor.requires_grad_(gradient)

  def evaluate() -> list[Any]:
    with torch.set_grad_enabled(gradient):
      value = loss(e_ND, c_VD, labels_N)
      results = [value.detach(), *(torch.autograd.grad(value, (e_ND, c_VD)) if gradient else ())]
    torch.cuda.synchronize()
    return results

  def memory() -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = evaluate()
    kept = sum(tensor.numel() * tensor.element_size() for tensor in results)
    return max(0, torch.cuda.max_memory_allocated() - before - kept)

  return Arm(lambda: [jnp.from_dlpack(tensor) for tensor in evaluate()], memory)


def liger() -> Callable[..., Any]:
  return importlib.import_module(
    "liger_kernel.transformers.functional"
  ).liger_fused_linear_cross_entropy


def cut_cross_entropy(implementation: str) -> Callable[..., Any]:
  loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
  return lambda e_ND, c_VD, labels_N: loss(e_ND, c_VD, labels_N, impl=implementation)


def ours(implementation: str | None) -> Callable[..., jax.Array]:
  return lambda e_ND, c_VD, labels_N: linear_cross_entropy(
    e_ND, c_VD, labels_N, implementation=implementation
  )


def arms(inputs: Inputs, gradient: bool, gpu: bool) -> Iterator[tuple[str, Callable[[], Arm]]]:
  """Yields names and makers, the yardstick first.

  A maker raises where its library is missing or cannot run here.
  """
  yield "materialised", lambda: jax_arm(materialised, inputs, gradient)
  yield "linear_cross_entropy, xla", lambda: jax_arm(ours("xla"), inputs, gradient)
  if gpu:
    yield "linear_cross_entropy, pallas_gpu", lambda: jax_arm(ours("pallas_gpu"), inputs, gradient)
    yield "Liger (Triton)", lambda: torch_arm(liger(), inputs, gradient)
    yield "Apple CCE, filtered", lambda: torch_arm(cut_cross_entropy("cce"), inputs, gradient)
    yield "Apple CCE, exact", lambda: torch_arm(cut_cross_entropy("cce_exact"), inputs, gradient)
