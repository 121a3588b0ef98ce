"""The loss of training without logits in memory against the same run with all of them."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import presets
from jaxlm.config import ComputeConfig, DataConfig, MeshConfig, TrainConfig, decoder, revise
from jaxlm.run import train
from jaxlm.run.run_folder import RunFolder, read_records

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture
def curve(corpus, tmp_path):
  """Returns curve(implementation, z_loss, model): 12 losses, then the one on held-out text."""

  def run(implementation: str, z_loss: float, model: dict):
    config = presets.micro()
    config = dataclasses.replace(
      config,
      steps=12,
      save_every=0,
      z_loss=z_loss,
      loss_implementation=implementation,
      run=str(tmp_path / implementation),
      mesh=MeshConfig(data=1),
      data=DataConfig(source=str(corpus), length=32, layout="packed"),
      model=revise(config.model, layers=1, **model),
      optimizer=dataclasses.replace(config.optimizer, warmup=2),
    )
    result = train(config)
    losses = [
      record["loss"] for record in read_records(RunFolder(tmp_path / implementation).metrics)
    ]
    return losses + [result.evaluation["heldout_loss"]]

  return run


def check_curve(curve, z_loss: float, model: dict) -> None:
  want, got = (curve(implementation, z_loss, model) for implementation in ("reference", "auto"))
  assert len(got) == 13 and want[-2] < want[0] - 0.5
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_as_users_get_it")
def test_the_loss_curve_is_that_of_materialised_logits(curve):
  check_curve(curve, 0.0, {})


@pytest.mark.slow
def test_so_it_is_with_a_large_vocabulary_tied_capped_and_z_loss(curve):
  check_curve(curve, 1e-2, {"V": 5000, "tied": True, "logit_cap": 5.0})


def test_memory_of_a_step_has_no_logits(lower_step):
  """4 B T V bytes would be 64 MiB a copy."""
  model = decoder(V=32_768, D=16, F=16, N=2, K=1, H=8, layers=1)
  config = TrainConfig(batch=4, model=model, data=DataConfig(length=128), mesh=MeshConfig(data=1))
  sizes = {}
  for implementation in ("auto", "reference"):
    lowered = lower_step(
      dataclasses.replace(config, loss_implementation=implementation), jax.devices()[:1]
    )
    sizes[implementation] = lowered.compile().memory_analysis().temp_size_in_bytes
  assert sizes["reference"] > 2 * 2**26 > 4 * sizes["auto"], sizes


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh", [MeshConfig(), MeshConfig(data=1, tensor=2, fsdp=4)], ids=MeshConfig.describe
)
def test_on_tpu_a_large_vocabulary_takes_the_kernel_and_reduces_the_heads_gradient_once(
  lower_step, tpu_devices, mesh
):
  config = TrainConfig(
    batch=16,
    accumulate=2,
    model=decoder(V=16_384, D=128, F=128, N=2, K=2, H=64, layers=1),
    compute=ComputeConfig(dtype="bfloat16", attention_implementation="reference"),
    data=DataConfig(length=256),
    mesh=mesh,
  )
  text = lower_step(config, tpu_devices).compile().as_text()
  assert "linear_cross_entropy_forward" in text and "linear_cross_entropy_backward" in text
