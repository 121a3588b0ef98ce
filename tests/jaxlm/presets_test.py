import dataclasses

import pytest

from jaxlm import presets
from jaxlm.config import MeshConfig
from jaxlm.run.resolve import check_mesh
from jaxlm.scaling.flops import parameter_count
from jaxlm.train.schedule import check_schedule


@pytest.mark.parametrize(
  "preset, millions",
  [
    (presets.micro, 0.03),
    (presets.tiny, 1),
    (presets.kda_hybrid, 1),
    (presets.nsa_tiny, 1),
    (presets.small, 10),
  ],
)
def test_presets_have_the_size_they_say_and_can_run_on_one_device_or_eight(preset, millions):
  config = preset()
  assert parameter_count(config.model).total / 1e6 == pytest.approx(millions, rel=0.25)
  check_schedule(config.optimizer, config.steps)  # the warm-up fits
  for mesh in (MeshConfig(data=1), MeshConfig(data=8)):
    check_mesh(dataclasses.replace(config, mesh=mesh))
