"""Blockwise 8-bit codes and their three products written out in numpy; products in float64."""

# Y[M, N] = X[M, K] W[K, N]
import secrets

import ml_dtypes
import numpy as np

SEED = secrets.randbits(32)  # new inputs every run; a failure prints it
FORMATS = {
  "e4m3fn": (ml_dtypes.float8_e4m3fn, 448),
  "e5m2": (ml_dtypes.float8_e5m2, 57344),
  "int8": (np.int8, 127),
}
MODES = ("f32", "pow2")


def quantize(x, block, dtype, scale):
  """Codes, scales [blocks, blocks] and codes * scales in float64, a block at a time."""
  kind, largest = FORMATS[dtype]
  x = np.asarray(x).astype(np.float32)
  x = np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)  # as hardware flushes
  codes, rows, (I, J) = np.zeros(x.shape, kind), [], block
  with np.errstate(all="ignore"):
    for i in range(0, x.shape[0], I):
      rows.append([])
      for j in range(0, x.shape[1], J):
        tile = x[i : i + I, j : j + J]
        s = np.abs(tile).max() / np.float32(largest)
        s = max(s, np.float32(2.0**-126)) if not np.isnan(s) else s
        if np.abs(tile).max() == 0:
          s = np.float32(1)
        elif scale == "pow2" and np.isfinite(s):
          mantissa, exponent = np.frexp(s)  # in [1/2, 1)
          s = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
        scaled = np.clip(tile / s, -largest, largest)
        codes[i : i + I, j : j + J] = (np.rint(scaled) if dtype == "int8" else scaled).astype(kind)
        rows[-1].append(s)
    scales = np.array(rows, np.float32)
    spread = scales.repeat(I, axis=0).repeat(J, axis=1)[: x.shape[0], : x.shape[1]]
    return codes, scales, codes.astype(np.float64) * spread


def products(x, w, dy, dtype="e4m3fn", bwd_dtype=None, scale="f32", block=128, save="bf16"):
  """Y, dX and dW of the recipe: products of dequantised matrices in float64."""
  bwd_dtype = bwd_dtype or dtype
  flat, tall, square = (1, block), (block, 1), (block, block)
  x_along_k = quantize(x, flat, dtype, scale)[2]
  w_of_both = quantize(w, square, dtype, scale)[2]
  kept = x_along_k if save == "fp8" else x
  x_along_m = quantize(kept, tall, dtype, scale)[2]
  dy_along_n, dy_along_m = (quantize(dy, tile, bwd_dtype, scale)[2] for tile in (flat, tall))
  with np.errstate(all="ignore"):
    return x_along_k @ w_of_both, dy_along_n @ w_of_both.T, x_along_m.T @ dy_along_m


def problem(M, K, N, seed=None):
  """X, W and the gradient of Y, normal numbers in float32."""
  rng = np.random.default_rng(SEED if seed is None else seed)
  shapes = ((M, K), (K, N), (M, N))
  return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def error(got, want):
  """Norm of the difference over the norm of `want`."""
  got, want = np.float64(got), np.float64(want)
  return np.linalg.norm(got - want) / np.linalg.norm(want)
