"""Pipeline parallelism: schedules, what they cost, and whether they are right. Needs no devices."""

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
