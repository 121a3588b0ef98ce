"""Makes pipeline schedules, tells what they cost, checks that they are right, and runs them."""

from sharding.pipeline.auto import auto_schedule
from sharding.pipeline.checker import check_schedule, check_table
from sharding.pipeline.executor import Pipeline, pipelined_value_and_grad
from sharding.pipeline.simulator import Footprint, Simulation, Times, simulate

__all__ = [
  "Footprint",
  "Pipeline",
  "Simulation",
  "Times",
  "auto_schedule",
  "check_schedule",
  "check_table",
  "pipelined_value_and_grad",
  "simulate",
]
