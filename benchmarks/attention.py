"""Compares attention's implementations with its reference, then times them and their memory.

    python -m benchmarks.attention [--out FOLDER] [--budget SECONDS]

Takes "xla", "cudnn" where it can run the call, and `jax.nn.dot_product_attention`, on the shapes of
the presets on GPU and on small ones on CPU. Needs jax alone. What disagrees with the reference is
not timed, and makes the exit status 1. Writes attention_<hardware>.md.
"""

# B batch, T positions, N query heads, K key heads, H head width
from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.table import hardware, publish, report, spread, table
from pallas_kernels.attention import attention

TURNS = 10
# relative errors of output and gradients: "P" and "dS" rounded to bfloat16 give 2.0e-3 and 2.5e-3
TOLERANCE = {"bfloat16": (4e-3, 6e-3), "float32": (2e-5, 5e-5)}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Describes causal self-attention at the size of one layer of a model."""

  name: str
  B: int
  T: int
  N: int
  K: int
  H: int
  window: int | None = None
  cap: float | None = None
  packed: bool = False
  checked: bool = True
  """Whether the reference's B x N x T x T logits fit."""

  def operations(self) -> float:
    """Returns the multiplications and additions of the forward pass that the mask leaves over."""
    window = self.window or self.T
    pairs = window * self.T - window * (window - 1) / 2
    return 4 * self.B * self.N * self.H * pairs

  def describe(self) -> str:
    extra = [f"window {self.window}"] if self.window else []
    extra += [f"cap {self.cap:g}"] if self.cap else []
    extra += ["packed"] if self.packed else []
    sizes = f"B {self.B}, T {self.T}, N {self.N}, K {self.K}, H {self.H}"
    return ", ".join([f"{self.name}: {sizes}", *extra])


GPU = (
  Shape("Llama 3.1 8B", 2, 4096, 32, 8, 128),
  Shape("Qwen2.5 0.5B", 4, 4096, 14, 2, 64, packed=True),
  Shape("Qwen2.5 0.5B", 4, 4096, 14, 2, 64, window=1024),
  Shape("Gemma 2 2B", 1, 8192, 8, 4, 256, window=4096, cap=50.0),
  Shape("Gemma 2 2B without cap", 1, 8192, 8, 4, 256),
  Shape("long", 1, 32768, 8, 2, 128, checked=False),
)
CPU = (
  Shape("1M", 16, 256, 4, 4, 32),
  Shape("small", 8, 512, 5, 5, 64),
  Shape("small", 8, 512, 5, 5, 64, window=128, cap=30.0, packed=True),
)


def inputs(shape: Shape, dtype: Any) -> tuple[jax.Array, ...]:
  """Returns q, k, v, the cotangent of the output, and the segments of packed rows or None."""
  keys = jax.random.split(jax.random.key(0), 5)
  heads = (shape.N, shape.K, shape.K, shape.N)
  arrays = [
    jax.random.normal(key, (shape.B, shape.T, count, shape.H)).astype(dtype)
    for key, count in zip(keys, heads)
  ]
  cuts_BT = jax.random.bernoulli(keys[4], 8 / shape.T, (shape.B, shape.T))
  return *arrays, jnp.cumsum(cuts_BT, axis=1, dtype=jnp.int32) if shape.packed else None


def library(q_BTNH, k_BTKH, v_BTKH, ids_BT, shape: Shape) -> jax.Array:
  """Attends by `jax.nn.dot_product_attention`, as it chooses."""
  if shape.cap is not None:
    raise NotImplementedError("jax.nn.dot_product_attention has no cap")
  mask = None if ids_BT is None else (ids_BT[:, :, None] == ids_BT[:, None, :])[:, None]
  window = None if shape.window is None else (shape.window - 1, 0)
  return jax.nn.dot_product_attention(
    q_BTNH, k_BTKH, v_BTKH, mask=mask, is_causal=True, local_window_size=window
  )


def ours(q_BTNH, k_BTKH, v_BTKH, ids_BT, shape: Shape, implementation: str) -> jax.Array:
  """Attends by one implementation of this project."""
  options = {"window": shape.window, "cap": shape.cap, "implementation": implementation}
  return attention(q_BTNH, k_BTKH, v_BTKH, q_segment_ids_BT=ids_BT, **options)


ARMS: dict[str, Callable[..., jax.Array]] = {
  "xla": functools.partial(ours, implementation="xla"),
  "cudnn": functools.partial(ours, implementation="cudnn"),
  "jax.nn": library,
}


def programs(attend: Callable[..., jax.Array], shape: Shape) -> dict[str, Callable[..., Any]]:
  """Returns the forward pass, and the one that gives output and gradients."""

  def forward(q, k, v, do, ids):
    return attend(q, k, v, ids, shape)

  def both(q, k, v, do, ids):
    o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids, shape), q, k, v)
    return o, *pull(do)

  return {"forward": jax.jit(forward), "forward + backward": jax.jit(both)}


@jax.jit
def relative(got: jax.Array, want: jax.Array) -> jax.Array:
  """Returns the norm of the difference over the norm of what is wanted."""
  got, want = got.astype(jnp.float32), want.astype(jnp.float32)
  return jnp.sqrt(jnp.sum(jnp.square(got - want)) / jnp.sum(jnp.square(want)))


def reference(shape: Shape, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """Returns output and gradients in float32 of the same, already rounded, numbers."""
  wide = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.float32), arrays)
  attend = functools.partial(ours, implementation="reference")
  return programs(attend, shape)["forward + backward"](*wide)


def describe(error: Exception) -> str:
  """Returns the type of the error and the first line of its message."""
  return f"{type(error).__name__}: {str(error).split(chr(10))[0][:200]}"


class Comparison:
  """Collects what agreed, what was timed, and what did not run."""

  def __init__(self, budget: float) -> None:
    self.stop = time.monotonic() + budget
    self.errors: list[list[str]] = []
    self.times: list[list[str]] = []
    self.skipped: list[str] = []
    self.failed = False

  def run(self, shape: Shape, dtype: str) -> None:
    """Checks and times all arms on one shape."""
    if time.monotonic() > self.stop:
      self.skipped.append(f"{shape.describe()}, {dtype}: the time is up")
      return
    arrays = inputs(shape, dtype)
    try:
      want = jax.block_until_ready(reference(shape, arrays)) if shape.checked else None
    except Exception as error:  # such as too little memory
      self.failed = True
      self.skipped.append(f"{shape.describe()}, {dtype}: the reference: {describe(error)}")
      return
    for name, attend in ARMS.items():
      about = f"{shape.describe()}, {dtype}, {name}"
      if time.monotonic() > self.stop:
        self.skipped.append(f"{about}: the time is up")
        continue
      try:
        both = {what: f.lower(*arrays).compile() for what, f in programs(attend, shape).items()}
        got = jax.block_until_ready(both["forward + backward"](*arrays))
      except Exception as error:  # whatever a library refuses, the others are compared
        self.skipped.append(f"{about}: {describe(error)}")
        continue
      if self.agrees(shape, dtype, name, got, want):
        for what, program in both.items():
          self.time(shape, dtype, name, what, program, arrays)

  def agrees(self, shape: Shape, dtype: str, name: str, got: Any, want: Any) -> bool:
    """Compares output and gradients with the reference's, where there is one."""
    if want is None:
      return True
    errors = [float(relative(g, w)) for g, w in zip(got, want, strict=True)]
    output, gradient = TOLERANCE[dtype]
    good = errors[0] <= output and max(errors[1:]) <= gradient
    row = [shape.describe(), dtype, name, *(f"{error:.1e}" for error in errors)]
    self.errors.append([*row, "yes" if good else "NO"])
    print(self.errors[-1], flush=True)
    self.failed |= not good and name != "jax.nn"  # of the library's own rounding no promise is ours
    return good or name == "jax.nn"

  def time(
    self, shape: Shape, dtype: str, name: str, what: str, program: Any, arrays: tuple[Any, ...]
  ) -> None:
    """Times one program, `TURNS` times."""
    seconds = []
    for _ in range(TURNS):
      start = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      seconds.append(time.perf_counter() - start)
    operations = shape.operations() * (1 if what == "forward" else 3.5)
    rate = operations / sorted(seconds)[len(seconds) // 2] / 1e12
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    row = [shape.describe(), dtype, name, what, spread(seconds, scale=1e3)]
    self.times.append([*row, f"{rate:.3g}", f"{memory:,.0f}"])
    print(self.times[-1], flush=True)

  def page(self) -> str:
    """Returns the report."""
    columns = ("shape", "dtype", "implementation")
    errors = table((*columns, "output", "dq", "dk", "dv", "agrees"), self.errors)
    units = ("ms: median (10 % - 90 %)", "TFLOP/s", "temp MiB")
    times = table((*columns, "what", *units), self.times)
    skipped = "\n".join(f"- {line}" for line in self.skipped)
    body = (
      f"Relative errors against the reference in float32:\n\n{errors}\n\n"
      "Times; operations are those that the mask leaves over, with the backward pass 3.5 times"
      f" the forward pass's:\n\n{times}\n\nNot run:\n\n{skipped}"
    )
    return report("Attention", body, "jax", "jaxlib")


def main() -> None:
  """Runs the comparison and writes its page."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, help="folder for attention_<hardware>.md")
  parser.add_argument("--budget", type=float, default=150, help="seconds; then no arm is started")
  arguments = parser.parse_args()
  comparison = Comparison(arguments.budget)
  on_gpu = jax.default_backend() == "gpu"
  for shape in GPU if on_gpu else CPU:
    comparison.run(shape, "bfloat16" if on_gpu else "float32")
  first = GPU[0] if on_gpu else CPU[0]
  comparison.run(first, "float32" if on_gpu else "bfloat16")
  path = arguments.out and arguments.out / f"attention_{hardware()}.md"
  publish(comparison.page(), path)
  sys.exit(comparison.failed)


if __name__ == "__main__":
  main()
