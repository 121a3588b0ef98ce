"""Loss laws of training in few bits: what share of its parameters a quantised model is worth."""

# N parameters, D training tokens, P bits, X runs; [P] fitted numbers, S starts, F formats,
# R resamples, U units that are drawn

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import check
from jaxlm.scaling.bootstrap import members
from jaxlm.scaling.laws import Counts, SumLaw
from jaxlm.scaling.runs import Run, column
from jaxlm.scaling.solver import minimize


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionLaw:
  """States the loss after training at P_w, P_a and P_kv bits (arXiv:2411.04330, equation 9).

  N counts as N (1 - exp(-(P / gamma + n))) once for weights, activations and KV cache
  (appendix K). The authors say that only the trends carry over to other models and data, not the
  constants.
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
  """by format, such as "4" for 4-bit weights and activations, "4NOH" without the rotation"""
  source: str

  def loss(self, N: Any, D: Any, precision: str) -> Any:
    """Returns the loss of N parameters in this format after D tokens."""
    known = ", ".join(self.efficiency)
    check(precision in self.efficiency, "precision", precision, f"must be one of {known}")
    return self.base.loss(N * self.efficiency[precision], D)

  def efficiency_of(self, N: Any, excess: Any) -> Any:
    """Returns the eff of one run of N parameters whose loss exceeds that in 16 bits so much."""
    return (1 + N**self.base.alpha * excess / self.base.A) ** (-1 / self.base.alpha)


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
    "1NOH": 0.0156,
    "2NOH": 0.0784,
    "3NOH": 0.3221,
    "4NOH": 0.6033,
    "8NOH": 0.9376,
  },
  source="arXiv:2502.05003; digits of its repository",
)


class EfficiencyFit(NamedTuple):
  """Holds a fitted law of efficiency, its objective, and what it was fitted to."""

  law: EfficiencyLaw
  objective: float
  """sum over runs of the Huber loss of residuals in ln loss"""
  numbers_P: np.ndarray
  """ln E, ln A and ln B at the mean ln N and ln D, alpha, beta; ln eff of the other formats"""
  runs: tuple[Run, ...]
  reference: str
  delta: float


def fit_efficiency(
  runs: Sequence[Run], *, reference: str = "16", counts: Counts = "body", delta: float = 1e-3
) -> EfficiencyFit:
  """Returns eff of every format in the runs, with one base law for all (arXiv:2502.05003, eq. 5).

  `reference` has eff 1. E often ends at 0: then only eff means something. Squared errors, as that
  paper's own fit takes them, are those of a large `delta`, such as 1.
  """
  others = _other_formats(runs, reference)
  least = float(column(runs, "loss").min())
  starts_SP = np.array(
    [
      [math.log(floor * least), math.log(least * (1 - floor)), alpha, math.log(least / 5), 0.3]
      + [-0.5] * len(others)
      for floor in (0.05, 0.5)
      for alpha in (0.07, 0.2)
    ]
  )
  data = _shared_data(runs, reference, counts)
  ends = minimize(_residual, starts_SP, data, np.ones((len(starts_SP), len(runs))), delta=delta)
  best = int(np.argmin(ends.objective))
  numbers_P = ends.numbers_P[best]
  law = _law_of(numbers_P, runs, reference, counts)
  return EfficiencyFit(law, float(ends.objective[best]), numbers_P, tuple(runs), reference, delta)


def bootstrap_efficiency(
  fit: EfficiencyFit, samples: int = 1000, *, by: Literal["run", "group"] = "run", seed: int = 0
) -> list[EfficiencyLaw]:
  """Returns the laws of `samples` tables drawn with replacement, each fitted again from the fit.

  By "group", runs of one group (of one size, unless they name theirs) are drawn together: runs that
  differ in their format alone, with the same weights at the start and the same text, share what is
  random in their loss. A table that lacks a format is drawn again.
  """
  check(samples > 0, "samples", samples, "must be positive")
  counts, rng = fit.law.base.counts, np.random.default_rng(seed)
  members_UX, data = members(fit.runs, counts, by), _shared_data(fit.runs, fit.reference, counts)
  units = len(members_UX)
  is_other_XF = data["format"]
  formats_XF = np.concatenate([is_other_XF, 1.0 - is_other_XF.sum(axis=1, keepdims=True)], axis=1)
  weights_RX = np.zeros((samples, len(fit.runs)))
  while (lacks_R := ((weights_RX @ formats_XF) == 0).any(axis=1)).any():
    draws_RU = rng.multinomial(units, np.full(units, 1 / units), size=int(lacks_R.sum()))
    weights_RX[lacks_R] = draws_RU @ members_UX
  starts_SP = np.tile(fit.numbers_P, (samples, 1))
  ends = minimize(_residual, starts_SP, data, weights_RX, delta=fit.delta)
  return [_law_of(numbers_P, fit.runs, fit.reference, counts) for numbers_P in ends.numbers_P]


def _other_formats(runs: Sequence[Run], reference: str) -> list[str]:
  formats = sorted({run.precision for run in runs})
  check(reference in formats, "reference", reference, f"must be one of {', '.join(formats)}")
  return [name for name in formats if name != reference]


def _shared_data(runs: Sequence[Run], reference: str, counts: Counts) -> dict[str, np.ndarray]:
  """Returns centred ln N and ln D, ln loss [X], and which format a run has [X, formats]."""
  log_N_X = np.log([run.parameters(counts) for run in runs])
  log_D_X = np.log(column(runs, "tokens"))
  others = _other_formats(runs, reference)
  return {
    "N": log_N_X - log_N_X.mean(),
    "D": log_D_X - log_D_X.mean(),
    "loss": np.log(column(runs, "loss")),
    "format": np.array([[run.precision == name for name in others] for run in runs]),
  }


def _law_of(
  numbers_P: np.ndarray, runs: Sequence[Run], reference: str, counts: Counts
) -> EfficiencyLaw:
  log_N = np.log([run.parameters(counts) for run in runs]).mean()
  log_D = np.log(column(runs, "tokens")).mean()
  log_E, log_A, alpha, log_B, beta, *log_eff = numbers_P.tolist()
  base = SumLaw(
    E=math.exp(log_E),
    A=math.exp(log_A + alpha * log_N),
    B=math.exp(log_B + beta * log_D),
    alpha=alpha,
    beta=beta,
    counts=counts,
    source=f"fit of {len(runs)} runs",
  )
  others = _other_formats(runs, reference)
  log_eff_F = np.clip(log_eff, -300, 300)  # where alpha is about 0, eff is anything
  efficiency = {reference: 1.0} | dict(zip(others, np.exp(log_eff_F).tolist()))
  return EfficiencyLaw(base=base, efficiency=efficiency, source=base.source)


def _residual(numbers_P: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
  """Returns ln of the law's loss minus ln of the measured one, [X]."""
  log_E, log_A, alpha, log_B, beta = numbers_P[:5]
  log_N_X = data["N"] + data["format"] @ numbers_P[5:]
  log_rest_X = jnp.logaddexp(log_A - alpha * log_N_X, log_B - beta * data["D"])
  return jnp.logaddexp(log_E, log_rest_X) - data["loss"]
