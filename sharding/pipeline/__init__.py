"""Makes pipeline schedules, tells what they cost and checks that they are right, off devices."""

from sharding.pipeline.auto import auto_schedule
from sharding.pipeline.checker import check_schedule, check_table
from sharding.pipeline.simulator import Footprint, Simulation, Times, simulate

__all__ = [
  "Footprint",
  "Simulation",
  "Times",
  "auto_schedule",
  "check_schedule",
  "check_table",
  "simulate",
]
