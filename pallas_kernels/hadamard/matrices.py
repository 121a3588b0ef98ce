"""Builds Hadamard matrices: symmetric, of +1 and -1, with H H = n I. Imports no jax."""

# N order of the matrix
from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.checks import check, check_choice

BASES = (1, 12, 20, 28, 40)


class Rotation(NamedTuple):
  """Names the matrix H_base (x) H_{n / base} and says how many rows of length `width` hold."""

  width: int
  """of the rotated axis; a multiple of n, each n consecutive elements are rotated alone"""
  n: int
  base: int

  @property
  def power(self) -> int:
    """Returns the order of the Sylvester factor, a power of two."""
    return self.n // self.base


def plan_rotation(width: int, block: int | None, base: int) -> Rotation:
  """Checks and returns the rotation of an axis of `width` by blocks (None: the whole axis)."""
  check_choice("base", base, BASES)
  check(width > 0, "x.shape", f"(..., {width})", "the rotated axis must not be empty")
  if block is not None:
    good = isinstance(block, int) and not isinstance(block, bool) and block > 0
    check(good, "block", block, "must be a positive integer or None")
    check(width % block == 0, "block", block, f"must divide the last axis of x, {width}")
  n = width if block is None else block
  usable = [m for m in BASES if n % m == 0 and (n // m).bit_count() == 1]
  name = "x.shape" if block is None else "block"
  hint = f"; base={usable[0]} would fit" if usable else "; a smaller block= may, padding would not"
  rule = f"the order {n} must be base={base} times a power of two{hint}"
  check(base in usable, name, n, rule)
  return Rotation(width, n, base)


@functools.cache
def base_matrix(order: int) -> np.ndarray:
  """Returns a symmetric Hadamard matrix of order 1, 12, 20, 28 or 40, int8.

  12, 20 and 28 are Paley's second construction over the fields of 5, 9 and 13 elements, which is
  symmetric: C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], where C is the conference matrix
  of quadratic residues. 40 doubles 20. They are equivalent to, but not the same matrices as, those
  of other libraries.
  """
  if order == 1:
    return np.ones((1, 1), np.int8)
  if order == 40:
    return np.kron(sylvester(2), base_matrix(20))
  conference = conference_matrix(order // 2 - 1)
  first, second = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
  identity = np.eye(len(conference), dtype=int)
  return (np.kron(conference, first) + np.kron(identity, second)).astype(np.int8)


def conference_matrix(q: int) -> np.ndarray:
  """Returns the symmetric conference matrix of order q + 1, for q = 5, 9 or 13 (1 modulo 4).

  An element of the field of 9 is a + b i modulo 3 with i^2 = -1; of a prime field, a alone.
  """
  p = 3 if q == 9 else q
  field = [(a, b) for a in range(p) for b in range(q // p)]
  squares = {((a * a - b * b) % p, 2 * a * b % p) for a, b in field} - {(0, 0)}

  def character(x: tuple[int, int], y: tuple[int, int]) -> int:
    difference = (x[0] - y[0]) % p, (x[1] - y[1]) % p
    return 0 if difference == (0, 0) else 1 if difference in squares else -1

  conference = np.ones((q + 1, q + 1), int)
  conference[1:, 1:] = [[character(x, y) for y in field] for x in field]
  conference[0, 0] = 0
  return conference


@functools.cache
def sylvester(order: int) -> np.ndarray:
  """Returns Sylvester's matrix in natural order, int8: entry (i, j) is (-1)^popcount(i & j)."""
  matrix = np.ones((1, 1), np.int8)
  while len(matrix) < order:
    matrix = np.kron(np.array([[1, 1], [1, -1]], np.int8), matrix)
  return matrix


def hadamard_matrix(n: int, base: int = 1) -> np.ndarray:
  """Returns the whole +-1 matrix of order n, int8: H_base (x) H_{n / base}."""
  return np.kron(base_matrix(base), sylvester(n // base))
