"""Loss laws as functions of parameters and tokens, with the constants that their sources print.

Every law says which parameters it calls N (`counts`), in which tokens it was fitted, and where its
constants come from. Losses are nats per token of the source's own text and tokenizer: constants of
two sources do not mix. Constants have as many digits as their source gives; rounding those of
Hoffmann et al. to two moves the best D / N at 5.76e23 FLOPs from 59 to 93.
"""

# N parameters, D training tokens, U unique tokens, C training FLOPs, P bits

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from scipy import optimize

from jaxlm.config import check

Counts = Literal["body", "body+head", "total", "effective"]
"""What a law calls N: the layers alone, the layers and the output matrix, everything, or a sixth of
the training FLOPs per token, in which attention counts too."""


class Allocation(NamedTuple):
  """Holds how a budget is spent: parameters, training tokens, and the loss that it buys."""

  N: float
  D: float
  loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumLaw:
  """States L(N, D) = E + (A / N^alpha + B / D^beta)^k.

  k = 1 is Hoffmann et al.'s law (arXiv:2203.15556, section 3.3); E = 0, beta = 1 and k = alpha_D is
  Kaplan et al.'s (arXiv:2001.08361, equation 1.5).
  """

  E: float
  A: float
  B: float
  alpha: float
  beta: float
  k: float = 1.0
  counts: Counts
  source: str

  def loss(self, N: Any, D: Any) -> Any:
    """Returns the loss at N parameters and D tokens, of their shape."""
    return self.E + (self.A * N**-self.alpha + self.B * D**-self.beta) ** self.k

  @property
  def exponent(self) -> float:
    """Returns a of N_opt ~ C^a, which is beta / (alpha + beta)."""
    return self.beta / (self.alpha + self.beta)

  def allocate(self, C: float) -> Allocation:
    """Returns the least loss that C = 6 N D FLOPs buy, where alpha A / N^alpha = beta B / D^beta.

    Arxiv:2203.15556, equation 4; k does not move the optimum.
    """
    ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
    N = ratio * (C / 6) ** self.exponent
    D = C / 6 / N
    return Allocation(N, D, float(self.loss(N, D)))

  def tokens_for(self, loss: float, N: float) -> float:
    """Returns the tokens after which N parameters have this loss; raises where they never do."""
    rest = self._sum_at(loss) - self.A * N**-self.alpha
    check(rest > 0, "loss", loss, f"N={N:.6g} parameters stay above {self.loss(N, math.inf):.6g}")
    return (self.B / rest) ** (1 / self.beta)

  def parameters_for(self, loss: float, D: float) -> float:
    """Returns the parameters that reach this loss on D tokens; raises where none do."""
    rest = self._sum_at(loss) - self.B * D**-self.beta
    check(rest > 0, "loss", loss, f"D={D:.6g} tokens stay above {self.loss(math.inf, D):.6g}")
    return (self.A / rest) ** (1 / self.alpha)

  def _sum_at(self, loss: float) -> float:
    """Returns A / N^alpha + B / D^beta where the law has this loss."""
    check(loss > self.E, "loss", loss, f"must be above the law's irreducible E={self.E:.6g}")
    return (loss - self.E) ** (1 / self.k)

  def allocate_for_inference(self, loss: float, tokens: float) -> Allocation:
    """Returns the cheapest N and D of this loss when the model then reads or writes `tokens` more.

    Minimises 6 N D + 2 N tokens (arXiv:2401.00448, equation 2). More use means a smaller model that
    trains longer.
    """
    least_N = (self.A / self._sum_at(loss)) ** (1 / self.alpha)

    def log_cost(log_N: float) -> float:
      N = math.exp(log_N)
      return log_N + math.log(6 * self.tokens_for(loss, N) + 2 * tokens)

    lowest = math.log(least_N)
    best = optimize.minimize_scalar(log_cost, bounds=(lowest + 1e-9, lowest + 40), method="bounded")
    N = math.exp(best.x)
    return Allocation(N, self.tokens_for(loss, N), loss)


def kaplan(alpha_N: float, alpha_D: float, N_c: float, D_c: float, source: str) -> SumLaw:
  """Returns [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D (arXiv:2001.08361, equation 1.5)."""
  alpha = alpha_N / alpha_D
  return SumLaw(
    E=0.0, A=N_c**alpha, B=D_c, alpha=alpha, beta=1.0, k=alpha_D, counts="body", source=source
  )


KAPLAN = kaplan(
  0.076,
  0.103,
  6.4e13,
  1.8e13,
  "arXiv:2001.08361, table 2, as five independent summaries quote it alike; not read in the paper",
)
HOFFMANN = SumLaw(
  E=1.6934,
  A=406.4,
  B=410.7,
  alpha=0.33917,
  beta=0.28491,
  counts="total",
  source="arXiv:2203.15556, equation 10; digits of its TeX source by arXiv:2404.10102",
)
HOFFMANN_ROUNDED = dataclasses.replace(
  HOFFMANN, E=1.69, alpha=0.34, beta=0.28, source="arXiv:2203.15556, equation 10, as printed"
)
BESIROGLU = SumLaw(
  E=1.8172,
  A=482.01,
  B=2085.43,
  alpha=0.3478,
  beta=0.3658,
  counts="total",
  source="arXiv:2404.10102, equation 1",
)
C4 = SumLaw(
  E=math.exp(0.6254804),
  A=math.exp(6.255414),
  B=math.exp(7.3049974),
  alpha=0.3526596,
  beta=0.3526596,
  counts="total",
  source="arXiv:2305.16264, appendix A; alpha = beta by construction",
)


def compute_multiplier(old: float, new: float, *, floor: float, alpha: float) -> float:
  """Returns how many times the compute `old` would need to reach the loss `new`.

  With L(C) = floor + A C^-alpha at equal C: ((old - floor) / (new - floor))^(1 / alpha). The floor
  belongs to one evaluation set and is hardly known from less than 1.5 decades of C.
  """
  for name, value in (("old", old), ("new", new)):
    check(value > floor, name, value, f"must be above floor={floor}")
  return ((old - floor) / (new - floor)) ** (1 / alpha)
