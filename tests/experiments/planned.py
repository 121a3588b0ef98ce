"""What a study of fine-tuned models plans to measure."""

from pathlib import Path

import pytest


def planned(study, scale):
  """Returns the points of a scale of a study, the module `experiments.NAME.run`."""
  points = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(study, "measure_points", lambda new, table, measure: points.extend(new))
    study.STUDY.measure(scale, Path("nowhere"), None)
  return points
