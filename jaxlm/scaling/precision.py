"""Loss laws of training in few bits: what share of its parameters a quantised model is worth."""

# N parameters, D training tokens, P bits

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxlm.config import check
from jaxlm.scaling.laws import SumLaw


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionLaw:
  """States the loss after training at P_w, P_a and P_kv bits (arXiv:2411.04330, equation 9).

  N counts as N (1 - exp(-(P / gamma + n))) once for weights, activations and KV cache
  (appendix K). The authors say that constants do not carry over to other models and data; only the trends do.
  """

  base: SumLaw
  gamma: tuple[float, float, float]
  """of weights, activations and KV cache, in bits"""
  n: tuple[float, float, float]
  C_T: float
  gamma_D: float
  gamma_N: float
  gamma_post: float
  source: str

  def effective_parameters(self, N: Any, P_w: Any = 16, P_a: Any = 16, P_kv: Any = 16) -> Any:
    """Returns N times one factor below 1 per precision."""
    for P, gamma, n in zip((P_w, P_a, P_kv), self.gamma, self.n):
      N = N * -np.expm1(-(P / gamma + n))
    return N

  def loss(self, N: Any, D: Any, P_w: Any = 16, P_a: Any = 16, P_kv: Any = 16) -> Any:
    """Returns the loss after training at these bits, before any quantisation afterwards."""
    return self.base.loss(self.effective_parameters(N, P_w, P_a, P_kv), D)

  def degradation(self, N: Any, D: Any, P: Any) -> Any:
    """Returns what quantising a 16-bit model's weights to P bits afterwards adds to its loss."""
    return self.C_T * D**self.gamma_D / N**self.gamma_N * np.exp(-P / self.gamma_post)


KUMAR = PrecisionLaw(
  base=SumLaw(
    E=2.7648,
    A=4.299e3,
    B=1.806e4,
    alpha=0.4965,
    beta=0.4965,
    counts="body",
    source="arXiv:2411.04330, table 2",
  ),
  gamma=(2.6745, 2.2102, 0.9578),
  n=(0.3037, 1.4072, 2.4185),
  C_T=0.0598,
  gamma_D=0.5068,
  gamma_N=0.3439,
  gamma_post=0.5907,
  source="arXiv:2411.04330, table 2",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficiencyLaw:
  """States L = A / (N eff)^alpha + B / D^beta + E (arXiv:2502.05003, equation 5).

  eff is what share of its parameters a quantised model is worth; 16 bits have 1. Its value goes
  with alpha: where alpha is forced to 0.1 or 0.2, eff(4) is 0.665 or 0.595 on the same runs. Here E
  lies at its lower bound, so that only eff is of use, not the irreducible loss.
  """

  base: SumLaw
  efficiency: dict[str, float]
  """by format, such as "4" for 4-bit weights and activations"""
  source: str

  def loss(self, N: Any, D: Any, precision: str) -> Any:
    """Returns the loss of N parameters in this format after D tokens."""
    known = ", ".join(self.efficiency)
    check(precision in self.efficiency, "precision", precision, f"must be one of {known}")
    return self.base.loss(N * self.efficiency[precision], D)


PANFEROV = EfficiencyLaw(
  base=SumLaw(
    E=0.00142,
    A=8.134,
    B=86.41,
    alpha=0.0627265,
    beta=0.241288,
    counts="body",
    source="IST-DASLab/QuEST, notebooks/plots.ipynb",
  ),
  efficiency={
    "16": 1.0,
    "1": 0.0205,
    "2": 0.1519,
    "3": 0.4331,
    "4": 0.6918,
    "8": 1.0162,
    "FP4": 0.6296,
    "INT4_2:4": 0.3812,
  },
  source="arXiv:2502.05003; digits of its repository",
)
