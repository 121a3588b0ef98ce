"""The loss law of repeated data: what epochs over the same text are worth."""

# N parameters, D training tokens, U unique tokens, C training FLOPs, X runs, S starts,
# P fitted numbers: ln R_D and ln R_N

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from jaxlm.scaling.laws import C4, Allocation, SumLaw
from jaxlm.scaling.runs import Run, column
from jaxlm.scaling.solver import minimize
from pallas_kernels.common.checks import check_choice


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
    """Returns N', where parameters beyond those that U tokens can use count less."""
    return _saturated(N, np.minimum(N, usable_parameters(self.base, U)), self.R_N)

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


def usable_parameters(base: SumLaw, U: Any) -> Any:
  """Returns N_opt of the budget whose D_opt is U."""
  ratio = (base.alpha * base.A / (base.beta * base.B)) ** (1 / (base.alpha + base.beta))
  return ratio * (ratio * U) ** (base.beta / base.alpha)


def _saturated(x: Any, unique: Any, R: Any) -> Any:
  """Returns unique + unique R (1 - exp(-(x / unique - 1) / R))."""
  expm1 = jnp.expm1 if isinstance(R, jax.Array) else np.expm1
  return unique - unique * R * expm1(-(x / unique - 1) / R)


MUENNIGHOFF = DataConstrainedLaw(
  base=C4, R_D=15.387756, R_N=5.309743, source="arXiv:2305.16264, section 5"
)


NO_DECAY = 1e12
"""R at which repetitions are worth as much as new data, for every number of epochs there is."""


class RepetitionFit(NamedTuple):
  """Holds a fitted law of repetition, and how much its R_D matters."""

  law: DataConstrainedLaw
  objective: float
  """sum over runs of the Huber loss of residuals in ln loss"""
  profile: dict[float, float]
  """R_D -> objective with the best R_N: flat where the table does not say what R_D is"""


def fit_repetition(
  runs: Sequence[Run],
  base: SumLaw = C4,
  *,
  decay: Literal["both", "tokens", "parameters"] = "both",
  delta: float = 1e-3,
) -> RepetitionFit:
  """Returns R_D and R_N of the runs with the base law as it is (arXiv:2305.16264, section 5).

  With `decay`, only repeated tokens or only excess parameters lose worth; the other R is NO_DECAY.
  The surface is a flat valley: on the published runs the best objectives for R_D from 12 to 1000
  differ by less than 0.5 %. Raises UserError for runs without unique_tokens.
  """
  check_choice("decay", decay, ("both", "tokens", "parameters"))
  N_X = np.array([run.parameters(base.counts) for run in runs])
  D_X, U_X = column(runs, "tokens"), column(runs, "unique_tokens")
  data = {
    "N": N_X,
    "usable": np.minimum(N_X, usable_parameters(base, U_X)),
    "D": D_X,
    "unique": np.minimum(D_X, U_X),
    "loss": column(runs, "loss"),
    "base": np.array([base.E, base.A, base.alpha, base.B, base.beta, base.k]),
  }

  def solve(tried_D: Sequence[float]) -> tuple[DataConstrainedLaw, float]:
    """Fits what is not fixed: R_D where several values are tried, R_N unless it does not decay."""
    tried_N = (NO_DECAY,) if decay == "tokens" else (0.5, 3.0, 15.0)
    starts_SP = np.log(list(itertools.product(tried_D, tried_N)))
    free_P = np.array([len(tried_D) > 1, len(tried_N) > 1], float)
    ones_SX = np.ones((len(starts_SP), len(runs)))
    ends = minimize(_residual, starts_SP, {**data, "free": free_P}, ones_SX, delta=delta)
    best = int(np.argmin(ends.objective))
    R_D, R_N = np.exp(ends.numbers_P[best]).tolist()
    law = DataConstrainedLaw(base=base, R_D=R_D, R_N=R_N, source=f"fit of {len(runs)} runs")
    return law, float(ends.objective[best])

  law, objective = solve((NO_DECAY,) if decay == "parameters" else (1.0, 5.0, 20.0, 80.0))
  values = () if decay == "parameters" else (1.0, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 1000.0)
  return RepetitionFit(law, objective, {R_D: solve((R_D,))[1] for R_D in values})


def _residual(log_R_P: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
  """Returns ln of the law's loss minus ln of the measured one, [X]; numbers not free stay."""
  free_P = data["free"]
  R_D, R_N = jnp.exp(free_P * log_R_P + (1 - free_P) * jax.lax.stop_gradient(log_R_P))
  E, A, alpha, B, beta, k = data["base"]
  N_X = _saturated(data["N"], data["usable"], R_N)
  D_X = _saturated(data["D"], data["unique"], R_D)
  return jnp.log(E + (A * N_X**-alpha + B * D_X**-beta) ** k) - jnp.log(data["loss"])
