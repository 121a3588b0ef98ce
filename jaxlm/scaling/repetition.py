"""The loss law of repeated data: what epochs over the same text are worth."""

# N parameters, D training tokens, U unique tokens, C training FLOPs

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import optimize

from jaxlm.scaling.laws import C4, Allocation, SumLaw


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConstrainedLaw:
  """States the law of repeated data, L = E + A / N'^alpha + B / D'^beta (arXiv:2305.16264, eq. 5).

  D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)): what D tokens are worth when U of them are unique;
  N' likewise, with the parameters that U tokens can use in place of U. The law saturates: it has no
  word for a loss that rises again when small data are repeated too often.
  """

  base: SumLaw
  R_D: float
  R_N: float
  source: str

  def effective_tokens(self, D: Any, U: Any) -> Any:
    """Returns D', at most U (1 + R_D); D itself where nothing is repeated."""
    return _saturated(D, np.minimum(D, U), self.R_D)

  def effective_parameters(self, N: Any, U: Any) -> Any:
    """Returns N', where parameters beyond the optimum of a budget with D_opt = U count less."""
    base = self.base
    ratio = (base.alpha * base.A / (base.beta * base.B)) ** (1 / (base.alpha + base.beta))
    usable = ratio * (ratio * U) ** (base.beta / base.alpha)
    return _saturated(N, np.minimum(N, usable), self.R_N)

  def loss(self, N: Any, D: Any, U: Any) -> Any:
    """Returns the loss of N parameters after D tokens, of which U are unique."""
    return self.base.loss(self.effective_parameters(N, U), self.effective_tokens(D, U))

  def allocate(self, C: float, U: float) -> Allocation:
    """Returns the least loss that C = 6 N D FLOPs buy with U unique tokens."""
    start = math.log(self.base.allocate(C).N)
    best = optimize.minimize_scalar(
      lambda log_N: self.loss(math.exp(log_N), C / 6 / math.exp(log_N), U),
      bounds=(start - 10, start + 10),
      method="bounded",
      options={"xatol": 1e-10},
    )
    N = math.exp(best.x)
    return Allocation(N, C / 6 / N, float(best.fun))


def _saturated(x: Any, unique: Any, R: float) -> Any:
  """Returns unique + unique R (1 - exp(-(x / unique - 1) / R))."""
  return unique - unique * R * np.expm1(-(x / unique - 1) / R)


MUENNIGHOFF = DataConstrainedLaw(
  base=C4, R_D=15.387756, R_N=5.309743, source="arXiv:2305.16264, section 5"
)
