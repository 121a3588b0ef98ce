"""`python -m pallas_kernels.schedule [--out FOLDER] [--chips v5e v6e] [--match NAME]`: the report."""

from __future__ import annotations

import argparse

from pallas_kernels.schedule.chips import CHIPS
from pallas_kernels.schedule.report import LIMITS, report


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m pallas_kernels.schedule", description=LIMITS)
  parser.add_argument("--out", default="benchmarks/results/tpu_schedule", help="folder of the report")
  parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
  parser.add_argument("--match", default="", help="only cases whose name contains this")
  arguments = parser.parse_args()
  report(arguments.out, arguments.chips, arguments.match)


if __name__ == "__main__":
  main()
