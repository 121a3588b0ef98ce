"""Puts a step's memory and times together, and finds the legal mesh that takes least time."""

# B rows, T positions, D model, V vocabulary, A micro-batches

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from pallas_kernels.common.checks import check
from pallas_kernels.common.errors import UserError
from pallas_kernels.common.topology import Topology
from sharding.mesh import MeshConfig, describe_sizes
from sharding.plan.network import place_axes
from sharding.plan.shapes import ModelShapes, Step, split_layers
from sharding.plan.traffic import (
  WEIGHT_AXES,
  Sizes,
  Traffic,
  local_tokens,
  local_weights,
  parts,
  step_traffic,
)
from sharding.roofline import peak_micro_batches, pipeline_bubble

_SUBLANES = 8
AXES = tuple(MeshConfig().sizes())
USABLE = 0.9
"""share of a device's memory that a plan may fill; the rest is the compiler's and the runtime's"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Holds what a step takes on one mesh. Bytes and seconds are of one device."""

  topology: Topology
  step: Step
  sizes: Mapping[str, int]
  memory: Mapping[str, float]
  traffic: tuple[Traffic, ...]
  times: Mapping[str, float]
  """compute, recompute, hbm, each kind of collective by its axes, bubble"""
  model_flops: float
  weight_rows: int
  """rows of D that a device holds of a weight"""

  @property
  def memory_bytes(self) -> float:
    """Returns the bytes that a device needs."""
    return sum(self.memory.values())

  @property
  def fits(self) -> bool:
    """Tells whether a device has that much, with a tenth to spare."""
    return self.memory_bytes <= USABLE * self.topology.chip.hbm_bytes

  @property
  def pads_weights(self) -> bool:
    """Tells whether a TPU pads a device's rows of D, which are no multiple of its 8 sublanes.

    The compiler then sums whole arrays in place of gathers and scatters: about twice the traffic.
    """
    return bool(self.topology.chip.torus_axes) and self.weight_rows % _SUBLANES != 0

  @property
  def collective_times(self) -> dict[str, float]:
    """Returns the times of collectives alone, by name."""
    own = ("compute", "recompute", "hbm", "bubble")
    return {name: seconds for name, seconds in self.times.items() if name not in own}

  @property
  def binding_times(self) -> dict[str, float]:
    """Returns the time of what can run beside each other: arithmetic, memory, each mesh axis."""
    by_axes: dict[str, float] = {}
    for name, seconds in self.collective_times.items():
      axes = name.partition(" over ")[2]
      by_axes[axes] = by_axes.get(axes, 0.0) + seconds
    arithmetic = self.times["compute"] + self.times["recompute"]
    return {"compute": arithmetic, "hbm": self.times["hbm"], **by_axes}

  @property
  def binds(self) -> str:
    """Returns what takes longest."""
    return max(self.binding_times, key=self.binding_times.__getitem__)

  @property
  def overlapped(self) -> float:
    """Returns the step's time if all that can overlap does."""
    return max(self.binding_times.values()) + self.times["bubble"]

  @property
  def separate(self) -> float:
    """Returns the step's time if no collective overlaps with anything."""
    working = max(self.binding_times["compute"], self.times["hbm"])
    return working + sum(self.collective_times.values()) + self.times["bubble"]

  @property
  def utilisation(self) -> float:
    """Returns the model's FLOPs over the peak's in the overlapped time: a bound on MFU."""
    return self.model_flops / (self.overlapped * float(self.topology.chip.bf16_flops or 0))


def illegality(model: ModelShapes, step: Step, sizes: Sizes) -> str | None:
  """Returns why the arrays cannot be spread over this mesh, or None if they can."""
  t, stages = sizes["tensor"], sizes["stage"]
  ring, ulysses = sizes["context_ring"], sizes["context_ulysses"]
  weights = parts(sizes, *WEIGHT_AXES)
  rows_split = parts(sizes, "data", "fsdp", "expert")
  positions = t * ulysses * ring * (2 if ring > 1 else 1)
  rules = [
    ("D", model.D, weights, "fsdp x context x expert"),
    ("V", model.V, t, "tensor"),
    ("rows of a micro-batch", step.batch // step.accumulate, rows_split, "data x fsdp x expert"),
    ("length", step.length, positions, "tensor x context (twice the ring)"),
  ]
  for layer, _ in model.layers:
    rules += [("N", layer.N, t, "tensor"), ("K", layer.K, t, "tensor"), ("F", layer.F, t, "tensor")]
    rules += [("N / tensor", layer.N // t, ulysses, "context_ulysses")]
    K = layer.K // t
    if K % ulysses and (K == 0 or ulysses % K):
      return f"K / tensor={K}: must be a multiple or a divisor of context_ulysses={ulysses}"
    if layer.E:
      rules += [("E", layer.E, sizes["expert"], "expert")]
      rules += [("expert F", layer.expert_F, t, "tensor")]
  for name, size, split, axes in rules:
    if size % split:
      return f"{name}={size}: must be a multiple of {axes}={split}"
  if sizes["expert"] > 1 and not any(layer.E for layer, _ in model.layers):
    return f"expert={sizes['expert']}: the model has no experts"
  if stages > model.count:
    return f"stage={stages}: the model has {model.count} layers"
  if stages > 1:
    least = {"zb_v": 2 * stages - 1, "dualpipe": 2 * stages, "dualpipev": 2 * stages}
    least_here = least.get(step.schedule, stages)
    if step.accumulate < least_here:
      return f"accumulate={step.accumulate}: {step.schedule} on {stages} stages needs {least_here}"
    if step.schedule == "interleaved" and step.accumulate % stages:
      return f"accumulate={step.accumulate}: must be a multiple of stage={stages} (interleaved)"
  return None


def make_plan(model: ModelShapes, step: Step, topology: Topology, sizes: Sizes) -> Plan:
  """Returns the plan of a step on one mesh; raises UserError where the mesh is not legal."""
  devices = math.prod(sizes.values())
  mesh = describe_sizes(sizes)
  rule = f"has {topology.devices} devices, mesh {mesh} needs {devices}"
  check(devices == topology.devices, "topology", topology.name, rule)
  if reason := illegality(model, step, sizes):
    raise UserError(f"mesh {mesh}: {reason}")
  traffic = step_traffic(model, step, sizes)
  return Plan(
    topology=topology,
    step=step,
    sizes=dict(sizes),
    memory=step_memory(model, step, sizes),
    traffic=tuple(traffic),
    times=step_times(model, step, topology, sizes, traffic),
    weight_rows=model.D // parts(sizes, *WEIGHT_AXES),
    model_flops=model.flops_per_token(step.length) * step.batch * step.length / devices,
  )


def step_memory(model: ModelShapes, step: Step, sizes: Sizes) -> dict[str, float]:
  """Returns the bytes of a device by purpose; what is kept for a layer is what `remat` says."""
  e, t, tokens = step.compute_bytes, sizes["tensor"], local_tokens(step, sizes)
  held = sum(local_weights(model, sizes))
  stages, micro = sizes["stage"], step.accumulate
  in_flight = 1.0
  if stages > 1:
    in_flight = peak_micro_batches(step.schedule, stages, micro, chunks=step.chunks)
  kept, transient = 0.0, 0.0
  for layer, count in split_layers(model, sizes["stage"]):
    inner = tokens * layer.inner_width / t * e
    stream = tokens * model.D / t * e
    own = {
      "full": stream,
      "none": inner + 4 * stream,
      "dots": tokens * layer.product_width / t * e + 3 * stream,
      "names": tokens * layer.N * layer.U / t * e + 2 * stream,
    }[step.remat]
    kept += count * own * in_flight
    gathered: float = layer.attention_weights + layer.mlp_weights
    gathered += layer.E / sizes["expert"] * layer.expert_weights
    working = inner + 4 * tokens * model.D * e + stream - own  # what is made again
    transient = max(transient, gathered / t * (e + step.reduce_bytes) + working)
  head = model.V * model.D / t * (e + step.reduce_bytes) + 2 * tokens * model.D * e
  memory = {
    "weights and moments": held * (4 + step.state_bytes),
    "gradients": 4 * held,
    "activations kept": kept,
    "one layer, or the head": max(transient, head),
  }
  if stages > 1:  # a stage's weights are gathered once, and their gradients summed at the end
    memory["gradients"] = 4 * held * sizes["fsdp"]
    memory["weights gathered"] = e * held * sizes["fsdp"]
  return memory


def step_times(
  model: ModelShapes, step: Step, topology: Topology, sizes: Sizes, traffic: Sequence[Traffic]
) -> dict[str, float]:
  """Returns the seconds of a step by what takes them, each as if nothing else ran."""
  chip, t, stages = topology.chip, sizes["tensor"], sizes["stage"]
  flops_per_s = chip.bf16_flops if step.compute_bytes == 2 else None
  flops_per_s = flops_per_s or (chip.bf16_flops or 0) / 2
  check(flops_per_s > 0, "topology", topology.name, "the chip table has no FLOP/s for its matrices")
  tokens = local_tokens(step, sizes) * step.accumulate
  forward = again = hbm = 0.0
  passes = 3 + (step.remat in ("full", "names"))
  for layer, count in split_layers(model, stages):
    weights, scores = 2 * layer.active_weights, layer.score_flops(step.length)
    forward += count * (weights + scores)
    again += (
      count * {"none": 0, "full": weights + scores, "dots": scores, "names": weights}[step.remat]
    )
    read = layer.weights - layer.E * layer.expert_weights * (1 - 1 / sizes["expert"])
    hbm += count * step.accumulate * read / t * (passes * step.compute_bytes + step.reduce_bytes)
    numbers = layer.inner_width / t + 4 * model.D
    hbm += count * tokens * numbers * passes * step.compute_bytes
  head = 2 * model.V * model.D / stages  # the end stages have fewer layers for it
  held = sum(local_weights(model, sizes))
  hbm += held * (2 * (4 + step.state_bytes) + 4 + 8 * (step.accumulate > 1) * step.accumulate)
  times = {
    "compute": 3 * tokens * (forward + head) / t / flops_per_s,
    "recompute": tokens * (again + head) / t / flops_per_s,  # the loss computes logits twice
    "hbm": hbm / chip.hbm_bytes_per_s,
  }
  network = place_axes(sizes, topology)
  for item in traffic:
    name = f"{item.kind} over {' x '.join(item.axes)}"
    seconds = item.times * network.seconds(item.kind, item.axes, item.bytes)
    times[name] = times.get(name, 0.0) + seconds
  times["bubble"] = 0.0
  if stages > 1:
    unit = tokens * forward / t / flops_per_s / step.accumulate
    backward = unit * (1 + again / forward)
    chunk = [time / step.chunks for time in (unit, backward, unit)]
    times["bubble"] = pipeline_bubble(step.schedule, stages, *chunk)
  return times


def best_plans(
  model: ModelShapes,
  step: Step,
  topology: Topology,
  *,
  axes: Sequence[str] = AXES,
  accumulate: Sequence[int] = (),
) -> list[Plan]:
  """Returns a plan for each legal mesh over these axes, the fastest that fit in memory first.

  `accumulate` lists numbers of micro-batches to try besides the step's own; without stages the
  fewest that fit, as more only send weights more often. Of equal bounds the lower time without
  overlap wins; meshes on which weights are padded come after the others. Raises UserError where no
  mesh of these axes is legal.
  """
  plans: list[Plan] = []
  reasons: dict[str, int] = {}
  numbers = [n for n in sorted({step.accumulate, *accumulate}) if step.batch % n == 0]
  steps = [dataclasses.replace(step, accumulate=number) for number in numbers]
  for sizes in _meshes(topology.devices, axes):
    for tried in steps:
      if reason := illegality(model, tried, sizes):
        reasons[reason] = reasons.get(reason, 0) + 1
        continue
      plans.append(make_plan(model, tried, topology, sizes))
      if sizes["stage"] == 1 and plans[-1].fits:
        break
  if not plans:
    common = max(reasons, key=reasons.__getitem__)
    rule = f"no mesh of its {topology.devices} devices over {', '.join(axes)} is legal; most often"
    raise UserError(f"topology={topology.name!r}: {rule}: {common}")
  return sorted(
    plans, key=lambda p: (not p.fits, p.pads_weights, p.overlapped, p.separate, p.memory_bytes)
  )


def _meshes(devices: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
  """Yields every way to split devices over these axes, all other axes 1."""
  primes = _prime_powers(devices)
  spread = [list(_compositions(power, len(axes))) for power in primes.values()]
  for exponents in itertools.product(*spread):
    sizes = dict.fromkeys(AXES, 1)
    for prime, powers in zip(primes, exponents):
      for axis, power in zip(axes, powers):
        sizes[axis] *= prime**power
    yield sizes


def _prime_powers(number: int) -> dict[int, int]:
  powers: dict[int, int] = {}
  factor = 2
  while number > 1:
    while number % factor == 0:
      powers[factor] = powers.get(factor, 0) + 1
      number //= factor
    factor += 1
  return powers


def _compositions(total: int, places: int) -> Iterator[tuple[int, ...]]:
  """Yields the tuples of `places` whole numbers from 0 that add up to `total`."""
  if places == 1:
    yield (total,)
    return
  for first in range(total + 1):
    for rest in _compositions(total - first, places - 1):
      yield (first, *rest)
