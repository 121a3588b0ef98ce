"""Intervals of means over independent runs, such as seeds."""

# X values

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

Interval = tuple[float, float, float]
"""a mean with the ends of its 95 % interval"""


def interval(values: Sequence[float]) -> Interval:
  """Returns the mean of independent values with its 95 % interval by Student's t."""
  values_X = np.asarray(values, float)
  mean, n = float(values_X.mean()), len(values_X)
  half = float(special.stdtrit(n - 1, 0.975) * values_X.std(ddof=1)) / math.sqrt(n)
  return mean, mean - half, mean + half
