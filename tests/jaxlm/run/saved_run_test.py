"""Runs that are opened on another platform than the one they were trained on."""

import dataclasses
import logging

import jax
import pytest

from jaxlm import presets
from jaxlm.config import TrainConfig
from jaxlm.decode import Sampler
from jaxlm.run import SavedRun, resume, train
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.saved_run import for_this_platform
from pallas_kernels.common.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


def with_kernels(config: TrainConfig, attention: str, loss: str) -> TrainConfig:
  compute = dataclasses.replace(config.compute, attention_implementation=attention)
  return dataclasses.replace(config, loss_implementation=loss, compute=compute)


def test_kernels_of_another_platform_are_replaced_and_the_log_says_so(caplog):
  with caplog.at_level(logging.INFO):
    config = for_this_platform(with_kernels(presets.micro(), "cudnn", "pallas_tpu"))
  assert config == with_kernels(presets.micro(), "auto", "auto")
  attention, loss = caplog.messages
  assert attention == (
    "compute.attention_implementation=cudnn of the run needs a gpu; on cpu it is chosen anew"
  )
  assert loss == "loss_implementation=pallas_tpu of the run needs a tpu; on cpu it is chosen anew"


def test_kernels_that_run_here_stay(monkeypatch, caplog):
  for attention, loss in (("xla", "reference"), ("auto", "auto")):
    config = with_kernels(presets.micro(), attention, loss)
    assert for_this_platform(config) == config
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  config = with_kernels(presets.micro(), "splash", "pallas_tpu")
  assert for_this_platform(config) == config and not caplog.messages


@pytest.mark.slow
def test_a_run_that_names_kernels_of_another_platform_can_be_sampled_here(tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("one, two, three. " * 400)
  config = presets.micro()
  data = dataclasses.replace(config.data, source=str(text))
  run = tmp_path / "run"
  config = dataclasses.replace(
    config, data=data, run=str(run), steps=11, save_every=11, eval_every=11, eval_batches=1
  )
  train(config)
  RunFolder(run).write_config(with_kernels(config, "splash", "pallas_tpu"))
  saved = SavedRun.open(run)
  saved.sample("one", sampler=Sampler(), max_new=2)
  assert saved.evaluate(limit=1)[1]["heldout_loss"] > 0
  with pytest.raises(UnsupportedError, match="implementation='splash'.*this is cpu"):
    resume(run, steps=12)  # training runs what its configuration names, or raises
