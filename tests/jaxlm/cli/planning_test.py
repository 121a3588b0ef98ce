"""`jaxlm plan` and `jaxlm compile`: what they print, and the one line of what they refuse."""

import pytest

from jaxlm.cli import main


def test_a_plan_shows_memory_times_what_binds_and_the_best_meshes(capsys, tmp_path):
  pytest.importorskip("matplotlib")
  figure = tmp_path / "plan.png"
  flags = f"--topology v5p:4x4x4 --figure {figure} --axes data fsdp tensor".split()
  assert main(["plan", "qwen2_5_7b", *flags]) == 0
  printed = capsys.readouterr().out
  for words in (
    "qwen2_5_7b: 7.62B parameters, v5p:4x4x4:",
    "64 chips, batch of 64 rows of 4,096 tokens",
    "weights and moments",
    "time of a step",
    "CCCC",
    "binds",
    "best legal meshes",
  ):
    assert words in printed
  assert figure.stat().st_size > 10_000


def test_a_mesh_that_is_given_is_planned_beside_the_best(capsys):
  flags = "--topology h100-sxm:64 --axes data fsdp --mesh.data 1 --mesh.fsdp 16 --mesh.tensor 4"
  assert main(["plan", "llama_3_1_8b", *flags.split()]) == 0
  printed = capsys.readouterr().out
  assert "mesh fsdp 16 x tensor 4, 1 micro-batch" in printed and "\nfsdp 64" in printed


def test_published_shapes_can_be_planned(capsys):
  flags = "--topology v5p:8x8x16 --axes fsdp expert".split()
  assert main(["plan", "deepseek_v3_shapes", *flags]) == 0
  assert "671.03B parameters (36.6B for a token)" in capsys.readouterr().out


def test_what_does_not_fit_is_planned_and_said(capsys):
  assert main("plan deepseek_v3_shapes --topology v5e:1x1".split()) == 0
  assert "together: does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
  "arguments, rule",
  [
    ("plan tiny", "topology='': must be given, as in --topology v5p:8x8x8"),
    ("plan tiny --topology v9:2x2", "topology='v9:2x2': there is no chip 'v9'"),
    ("plan tiny --topology v5e:2x2 --axes rows", "axes='rows': must be of data, stage"),
    ("plan tiny --topology v5e:2x2 --mesh.fsdp 3", "4 devices cannot be split into groups of 3"),
    ("plan tiny --topology v5e:4x4 --mesh.data 1 --mesh.tensor 16", "mesh tensor 16: N=2: must be"),
    ("compile tiny", "topology='': must be given"),
    ("compile tiny --topology h100-sxm:8", "only TPU programs compile without the device"),
    ("compile nothing --topology v5e:2x2", "preset 'nothing' does not exist"),
  ],
)
def test_what_is_refused_is_one_line(arguments, rule, capsys, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert main(arguments.split()) == 2
  error = capsys.readouterr().err
  assert error.startswith("jaxlm: ") and error.count("\n") == 1 and rule in error
