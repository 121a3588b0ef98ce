"""Models of other mixers than attention train and sample, and decline to be exported."""

import json

import pytest

from jaxlm.cli import main
from jaxlm.run import SavedRun

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["kda_hybrid", "nsa_tiny"])
def test_a_preset_trains_and_samples(preset, corpus, tmp_path, capsys):
  run = tmp_path / "run"
  flags = f"--steps 12 --batch 4 --data.length 64 --run {run} --data.source {corpus}"
  flags += " --mesh.data 1 --model.D 32 --optimizer.warmup 2 --eval_batches 1"
  assert main(["train", preset, *flags.split()]) == 0
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  losses = [line["loss"] for line in lines if "loss" in line]
  assert losses[-1] < losses[0] - 0.3
  assert main(["sample", str(run), "--prompt", "import ", "--max_new", "20"]) == 0
  assert "import " in capsys.readouterr().out
  saved = SavedRun.open(str(run))
  kind = type(saved.config.model.pattern[0].mixer).__name__
  assert preset.startswith(kind.lower()[:3])
  assert main(["convert", str(run), str(tmp_path / "export")]) == 2
  assert f"a layer is a {kind}" in capsys.readouterr().err
