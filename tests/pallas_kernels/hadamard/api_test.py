"""What the rotations refuse, and that codes have no gradient."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.hadamard import hadamard, hadamard_quantize

X = jnp.ones((2, 256))


@pytest.mark.parametrize(
  ("run", "message"),
  [
    (lambda: hadamard(jnp.ones(())), "must have at least one axis"),
    (lambda: hadamard(jnp.ones(4, jnp.int32)), "x.dtype='int32': must be floating"),
    (lambda: hadamard(jnp.ones(48)), "the order 48 must be base=1 times .* base=12 would fit"),
    (lambda: hadamard(jnp.ones(36)), "padding would not"),
    (lambda: hadamard(X, base=3), "base=3: must be one of 1, 12, 20, 28, 40"),
    (lambda: hadamard(X, block=96), "block=96: must divide the last axis of x, 256"),
    (lambda: hadamard(X, block=-1), "block=-1: must be a positive integer"),
    (lambda: hadamard(X, signs=jnp.ones(5)), r"signs.shape=\(5,\)"),
    (lambda: hadamard(X, signs=jnp.full(256, 2.0)), "must be \\+1 or -1"),
    (lambda: hadamard(X, signs=jnp.ones(256, jnp.uint8)), "signs.dtype='uint8'"),
    (lambda: hadamard(X, implementation="mosaic"), "implementation='mosaic': must be one of"),
    (lambda: hadamard(X, interpret=True), "interpret=True: needs implementation= one of"),
    (lambda: hadamard_quantize(X, group=96, dtype="int8"), "group=96: must divide"),
    (lambda: hadamard_quantize(X, group=32, dtype="int3"), "dtype='int3': must be one of"),
    (lambda: hadamard_quantize(X, group=32, dtype="int8", scale="rms"), "'absmax', 'quest'"),
    (
      lambda: hadamard_quantize(X, group=32, dtype="e5m2", scale="quest"),
      "scale='quest' takes int4 or int8",
    ),
    (
      lambda: hadamard_quantize(X, group=32, dtype="int8", rounding="stochastic"),
      "key=None: goes with rounding='stochastic'",
    ),
  ],
)
def test_mistakes(run, message):
  with pytest.raises(ValueError, match=message):
    run()


@pytest.mark.parametrize(
  ("run", "message"),
  [
    (hadamard, "not a TPU; interpret=True"),
    (functools.partial(hadamard, interpret="yes"), "neither True nor pltpu.InterpretParams"),
    (functools.partial(hadamard, block=64, base=1, interpret=True), None),
    (lambda x, **o: hadamard(x[:, :64], interpret=True, **o), "must be a multiple of 128"),
    (lambda x, **o: hadamard(x.astype(jnp.float16), interpret=True, **o), "float32 and bfloat16"),
    (
      functools.partial(hadamard_quantize, group=32, dtype="int8", interpret=True),
      "group=32, the kernel takes multiples of 128",
    ),
    (
      functools.partial(hadamard_quantize, group=128, dtype="mxfp4", interpret=True),
      "no 4-bit floats",
    ),
  ],
)
def test_what_the_kernel_cannot_do(run, message):
  if message is None:
    assert jax.eval_shape(functools.partial(run, implementation="pallas_tpu"), X).shape == X.shape
    return
  with pytest.raises(NotImplementedError, match=message):
    run(X, implementation="pallas_tpu")


def test_codes_have_no_gradient_and_say_so():
  def loss(x):
    return jnp.sum(hadamard_quantize(x, group=32, dtype="e4m3fn").scales)

  with pytest.raises(NotImplementedError, match="values=True has the straight-through one"):
    jax.grad(loss)(X)
  assert loss(X) == loss(jax.lax.stop_gradient(X))
