"""Says how long arithmetic, memory and networks take at least: a roofline, unrounded.

Source, unless another is named: How to Scale Your Model (jax-ml.github.io/scaling-book, edition of
December 2025). Times are in seconds, sizes in bytes, rates per second. C is the FLOP/s of a device,
W the bandwidth of one axis of a torus in both directions together, w one-way or a GPU's egress.
"""

# B tokens, D model, F feed-forward, N query heads, K key heads, H head width, T positions,
# L layers, V vocabulary, E experts, k active experts, X devices that split the batch,
# Y devices that split the model, M micro-batches, P pipeline ranks

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pallas_kernels.common.checks import check, check_choice

HOP_SECONDS = 1e-6
"""time of one hop over ICI, whatever it carries"""


class Bounds(NamedTuple):
  """Holds the time of two things that overlap wholly, and not at all."""

  overlapped: float
  separate: float


def bounds(*times: float) -> Bounds:
  """Returns the largest of these times, and their sum."""
  return Bounds(max(times), sum(times))


def matmul_time(
  B: float, D: float, F: float, flops_per_s: float, hbm_per_s: float, element_bytes: float = 2
) -> Bounds:
  """Returns bounds on the time of [B, D] x [D, F]: 2BDF/C and e(BD + DF + BF)/W_hbm."""
  arithmetic = 2 * B * D * F / flops_per_s
  return bounds(arithmetic, element_bytes * (B * D + D * F + B * F) / hbm_per_s)


def critical_batch(
  flops_per_s: float, hbm_per_s: float, weight_bytes: float = 2, flops_per_weight: float = 2
) -> float:
  """Returns the tokens from which a product with weights in HBM is bound by arithmetic."""
  return flops_per_s * weight_bytes / (flops_per_weight * hbm_per_s)


def all_gather_time(
  V: float, axes: Sequence[int], W: float, *, hop_seconds: float = HOP_SECONDS
) -> float:
  """Returns the time to gather V bytes over rings of these lengths: max(hops, V/(W axes)).

  A reduce-scatter to V bytes takes as long, an all-reduce twice. Where other axes split the array
  too, V is a device's part of it.
  """
  return max(hop_seconds * sum(size / 2 for size in axes), V / (W * len(axes)))


def all_gather_time_on_line(
  V: float, devices: int, w: float, *, hop_seconds: float = HOP_SECONDS
) -> float:
  """Returns the same without links that close the ring: N - 1 hops of V/N bytes one way."""
  return (devices - 1) * max(hop_seconds, V / devices / w)


def all_reduce_time(V: float, axes: Sequence[int], W: float) -> float:
  """Returns the time to sum V bytes over rings: a reduce-scatter and an all-gather."""
  return 2 * all_gather_time(V, axes, W)


def all_to_all_time(V: float, axes: Sequence[int], W: float) -> float:
  """Returns the time to exchange V bytes, all devices together: V/4W on a ring.

  On a torus of N devices it is V max(A_i)/(4 N W).
  """
  return V * max(axes) / (4 * math.prod(axes) * W)


def node_all_gather_time(V: float, gpus: int, w: float) -> float:
  """Returns the time to gather, or reduce-scatter, V bytes in a node: V (N - 1)/(N w)."""
  return V * (gpus - 1) / (gpus * w)


def node_all_to_all_time(V: float, gpus: int, w: float) -> float:
  """Returns the time to exchange V bytes, all GPUs of the node together: V (N - 1)/(N^2 w)."""
  return V * (gpus - 1) / (gpus**2 * w)


def across_nodes_all_gather_time(V: float, w_node: float) -> float:
  """Returns the time to gather, or reduce-scatter, V bytes over nodes: V/W_node."""
  return V / w_node


def across_nodes_all_to_all_time(V: float, nodes: int, w_node: float) -> float:
  """Returns the time to exchange V bytes over M nodes: V (M - 1)/(M^2 W_node)."""
  return V * (nodes - 1) / (nodes**2 * w_node)


def corner_to_corner(
  V: float, shape: Sequence[int], w: float, *, hop_seconds: float = HOP_SECONDS
) -> tuple[float, float]:
  """Returns when the first and the last of V bytes arrive, sent over a mesh without rings.

  They go from one corner to the opposite one, over a link of each axis at once.
  """
  first = hop_seconds * sum(size - 1 for size in shape)
  return first, first + V / (w * sum(size > 1 for size in shape))


def data_parallel_tokens(
  flops_per_s: float, W: float, axes: int = 1, *, experts: int = 1, active: int = 1
) -> float:
  """Returns the tokens per device from which data parallelism or FSDP is bound by arithmetic.

  alpha/M_X with alpha = C/W; a mixture, whose weights all move and of which k of E work, E/k times.
  """
  return flops_per_s / W / axes * experts / active


def tensor_parallel_limit(F: float, flops_per_s: float, W: float, axes: int = 1) -> float:
  """Returns the devices up to which tensor parallelism is bound by arithmetic: M_Y F/alpha."""
  return axes * F / (flops_per_s / W)


def best_fsdp_size(B: float, F: float, devices: int, axes_x: int = 1, axes_y: int = 1) -> float:
  """Returns the FSDP size at which FSDP and tensor send least: sqrt(B/F M_X/M_Y N)."""
  return math.sqrt(B / F * axes_x / axes_y * devices)


def least_tokens_per_device(
  F: float,
  flops_per_s: float,
  W: float,
  axes_x: int = 1,
  axes_y: int = 1,
  *,
  combine: Literal["max", "sum"] = "max",
) -> float:
  """Returns the tokens per device from which FSDP with tensor at its best size is compute bound.

  alpha^2/(M_X M_Y F) where the two collectives overlap; 4 times that where they add, as in the
  edition of February 2025.
  """
  check_choice("combine", combine, ("max", "sum"))
  least = (flops_per_s / W) ** 2 / (axes_x * axes_y * F)
  return least if combine == "max" else 4 * least


def slice_tokens(flops_per_s: float, dcn_per_s: float) -> float:
  """Returns the tokens per slice from which data parallelism over DCN is bound by arithmetic."""
  return flops_per_s / dcn_per_s


def pipeline_hop_time(
  B: float, D: float, M: int, P: int, W: float, element_bytes: float = 2
) -> Bounds:
  """Returns the time of one hop of a micro-batch, e B D/(W M), and of all M + P - 2 of a pass."""
  hop = element_bytes * B * D / (W * M)
  return Bounds(hop, hop * (M + P - 2))


def decoder_parameters(
  D: int, F: int, N: int, K: int, H: int, L: int, V: int, *, tied: bool = False
) -> int:
  """Returns the weights of a gated decoder: L (3DF + 2D(N + K)H) + 2VD, or VD if tied."""
  return L * (3 * D * F + 2 * D * (N + K) * H) + (1 if tied else 2) * V * D


def train_flops_per_token(
  parameters: float, T: float, N: int, H: int, L: int, *, causal: bool = False
) -> float:
  """Returns the FLOPs of forward and backward: 6 parameters + 12 T N H L, or half of the latter."""
  return 6 * parameters + 12 * T * N * H * L / (2 if causal else 1)


def train_seconds(
  parameters: float, tokens: float, devices: int, flops_per_s: float, utilisation: float
) -> float:
  """Returns the time to train on so many tokens, at 6 FLOPs per parameter and token."""
  return 6 * parameters * tokens / (devices * flops_per_s * utilisation)


def adam_bytes(parameters: float, weight_bytes: float = 2, moment_bytes: float = 4) -> float:
  """Returns the bytes of weights and two moments: 10 per parameter for bfloat16 and float32."""
  return parameters * (weight_bytes + 2 * moment_bytes)


def activation_bytes(
  T: float,
  B: float,
  D: float,
  N: float,
  *,
  tensor: int = 1,
  sequence: bool = False,
  recompute: Literal["none", "selective", "full"] = "none",
) -> float:
  """Returns what a layer of a GPT keeps for its backward pass, in bfloat16, for B rows.

  Source: Korthikanti et al. 2022, arXiv 2205.05198, table 2; without `sequence`, norms and
  dropout are not split by tensor parallelism. Attention's logits are materialised.
  """
  check_choice("recompute", recompute, ("none", "selective", "full"))
  if recompute == "full":
    return 2 * T * B * D
  scores = 5 * N * T / D if recompute == "none" else 0.0
  if sequence:
    return T * B * D / tensor * (34 + scores)
  return T * B * D * (10 + 24 / tensor + scores / tensor)


def ulysses_bytes(
  B: float, T: float, N: int, K: int, H: int, devices: int, element_bytes: float = 2
) -> float:
  """Returns what a device sends in a layer's forward pass with its sequence split by all-to-all.

  Heads of keys are repeated up to the number of devices. Derived from arXiv 2309.14509.
  """
  c = devices
  return element_bytes * B * T / c * H * (2 * N + 2 * max(K, c)) * (c - 1) / c


def ring_bytes(
  B: float, T: float, K: int, H: int, devices: int, element_bytes: float = 2
) -> tuple[float, float]:
  """Returns what a device sends forward, and backward, in a layer with keys going round a ring.

  Backward keys, values and both their gradients travel, which come home by one hop more. Derived
  from arXiv 2310.01889.
  """
  block, hops = element_bytes * B * T / devices * K * H, devices - 1
  return 2 * hops * block, (4 * hops + 2) * block


def ring_overlap_tokens(
  flops_per_s: float, w: float, N: int, K: int, *, zigzag: bool = False
) -> float:
  """Returns the tokens per device from which a bfloat16 hop hides behind a block's arithmetic.

  (C/w)(K/N) for a whole block, twice that for the half block of zigzag order; w is one-way.
  """
  return (2 if zigzag else 1) * flops_per_s / w * K / N


def ulysses_sends_less(devices: int, N: int, K: int) -> bool:
  """Tells whether Ulysses sends fewer bytes than a ring, with K of at least `devices`."""
  return devices > 1 + N / K


def expert_exchange_bytes(
  tokens: float,
  D: float,
  experts: int,
  active: int,
  devices: int,
  *,
  capacity: float = 1.0,
  element_bytes: float = 2,
) -> float:
  """Returns what a device sends one way in a mixture: e E C D (ep - 1)/ep, C = ceil(cf B k/E)."""
  slots = math.ceil(capacity * tokens * active / experts)
  return element_bytes * experts * slots * D * (devices - 1) / devices


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_h2", "zb_v", "dualpipe", "dualpipev")


def pipeline_bubble(schedule: str, P: int, forward: float, backward: float, weight: float) -> float:
  """Returns the idle time of a step, given the times of one micro-batch in one chunk of a stage.

  `backward` is the gradient of a chunk's input, `weight` that of its weights; hops take no time.
  Sources: arXiv 2401.10241, table 2; the README of deepseek-ai/DualPipe, with no gain from overlap.
  For `zb_v` it holds where backward + weight = 2 forward.
  """
  check_choice("schedule", schedule, SCHEDULES)
  check(P >= 1, "stages", P, "must be at least 1")
  whole = forward + backward + weight
  if schedule in ("gpipe", "1f1b", "interleaved"):
    return (P - 1) * whole
  if schedule == "zb_h1":
    return (P - 1) * (forward + backward - weight)
  if schedule == "zb_h2":
    return (P - 1) * max(0.0, forward + backward - 2 * weight)
  if schedule == "zb_v":
    return 2 * (P - 1) * max(0.0, backward - weight)
  stages = 2 * P if schedule == "dualpipev" else P
  return (stages / 2 - 1) * (whole + backward - 2 * weight)


def pipeline_ticks(schedule: str, P: int, M: int, *, chunks: int = 1) -> int:
  """Returns the ticks of a schedule whose F, B and W take one each and whose ranks wait for all.

  That is how `sharding.pipeline.executor` runs it; each tick has a message in both directions.
  """
  check_choice("schedule", schedule, SCHEDULES)
  fused = schedule in ("gpipe", "1f1b", "interleaved")
  return 3 * M * chunks + (2 if fused else 1) * (P - 1)


def peak_micro_batches(schedule: str, P: int, M: int, *, chunks: int = 1) -> float:
  """Returns the most micro-batches of which a rank keeps activations, in those of all its stages.

  `chunks` is the number of stages on a rank: any for `interleaved`, 2 for `zb_v` and `dualpipev`.
  Sources: as for the bubbles; arXiv 2104.04473, section 2.2.
  """
  check_choice("schedule", schedule, SCHEDULES)
  kept = {
    "gpipe": M * chunks,
    "interleaved": min(M * chunks, 2 * (P - 1) + (chunks - 1) * P + 1),
    "zb_h2": min(M, 2 * P - 1),
    "zb_v": 2 * P,
    "dualpipe": P + 1,
    "dualpipev": 2 * P + 1,
  }.get(schedule, min(M, P))
  return kept / chunks
