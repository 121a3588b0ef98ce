"""Configures the pipeline that a mesh with `stage` above 1 trains by."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.config.checks import check

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zb_h2", "zb_v", "dualpipev"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
  """Configures how layers are cut into stages and in which order micro-batches pass them.

  The micro-batches are those of `accumulate`; ranks are the devices along mesh.stage. Nothing here
  changes what is computed.
  """

  schedule: PipelineSchedule = "1f1b"
  """order of forward and backward passes; zb_*: with gradients of inputs and of weights apart"""
  stages_per_rank: int = 2
  """stages that interleaved lays on each rank (zb_v and dualpipev lay 2, the others 1)"""
  layers_per_stage: tuple[int, ...] = ()
  """layers of each stage, in order; empty: as equal as possible, the middle ones more"""

  def __post_init__(self) -> None:
    stages = self.stages_per_rank
    check(stages >= 1, "pipeline.stages_per_rank", stages, "must be at least 1")
