"""The command line, as real processes where signals and start-up matter."""

import json
import re
import signal
import sys

import pytest

from benchmarks.reliability.comparison import last_step
from benchmarks.reliability.processes import finish, run, start, start_python, wait_until
from jaxlm.cli import main
from jaxlm.run.run_folder import RunFolder, read_records

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

SMALLER = (
  "--model.D 16 "
  "--model.pattern.0.feedforward.F 16 --model.pattern.0.mixer.H 8 "
  "--data.length 32 --optimizer.warmup 1 --eval_batches 1 --ema 0"
).split()


def test_help_does_not_import_jax_and_takes_less_than_a_second_of_the_processor(tmp_path):
  script = "import sys, time, jaxlm.cli; jaxlm.cli.main(['--help']); jaxlm.cli.main(['train']); "
  script += "print(time.process_time()); sys.exit('jax' in sys.modules)"
  status, printed = finish(tmp_path, start_python(tmp_path, "-c", script))
  assert status == 0, printed
  for word in ("train PRESET", "resume DIR", "sample DIR", "eval DIR", "micro", "tiny", "small"):
    assert word in printed
  assert float(printed.splitlines()[-1]) < 1


def test_help_of_a_command_explains_its_flags_without_jax(tmp_path):
  script = """
import sys, jaxlm.cli
COMMANDS = ["train", "micro"], ["sample"], ["resume"], ["eval"], ["kernels"], ["kernels", "report"]
for arguments in ([*command, "--help"] for command in COMMANDS):
  try:
    jaxlm.cli.main(arguments)
  except SystemExit as stop:
    assert not stop.code
sys.exit("jax" in sys.modules)
"""
  status, printed = finish(tmp_path, start_python(tmp_path, "-c", script, COLUMNS="120"))
  assert status == 0, printed
  for words in (
    "--model.layers",
    "number of layers",
    "--optimizer.learning-rate",
    "--mesh.fsdp",
    "--temperature",
  ):
    assert words in printed or words.replace("-rate", "_rate") in printed, words
  # what the preset says is the default, on the flag's next line
  assert re.search(r"--model\.layers INT.*\n.*number of layers.*\(default: 2\)", printed)


WRONG = [
  (["trian", "micro"], "command 'trian' does not exist; nearest: train"),
  (["train", "mikro"], "preset 'mikro' does not exist; nearest: micro"),
  (
    ["train", "micro", "--model.pattern.0.mixer.N", "3", "--model.pattern.0.mixer.K", "2"],
    "mixer.N=3: query heads must be a multiple of K=2",
  ),
  (
    ["train", "micro", "--batch", "6", "--accumulate", "4"],
    "batch=6: must be a multiple of accumulate=4",
  ),
  (
    ["train", "micro", "--optimizer.learning_rate", "-1"],
    "optimizer.learning_rate=-1.0: must be above 0",
  ),
  (["train", "micro", "--mesh.data", "0"], "mesh.data=0: an axis has at least 1 device"),
  (["train", "micro", "--data.source", "/nowhere", "--run", "r"], "/nowhere"),
  (["train", "no_such_module:preset"], "preset 'no_such_module:preset'"),
  (["train", "jaxlm.presets:nothing"], "module jaxlm.presets has no function nothing"),
  (["resume", "missing"], "run='missing': no such folder"),
  (["eval", "missing"], "missing: no such folder; a model on the Hub is named hf:owner/name"),
  (["sample", "missing", "--temperature", "-1"], "temperature"),
  (["checkpoint", "verify", "missing"], "run='missing': no such folder"),
  (["train", "micro", "--stop_after", "2"], "stop_after='2': must be a number with its unit"),
  (["kernels", "list"], "command 'kernels list' does not exist; nearest: kernels report"),
  (
    ["kernels", "report", "--chips", "v99"],
    "chips='v99': must be one of 'v5e', 'v5p', 'v6e', 'tpu7x'",
  ),
  (["kernels", "report", "--match", "none such"], "match='none such': names none of"),
]


@pytest.mark.parametrize(
  "arguments, message", WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_is_wrong_is_named_with_its_value_and_rule(
  arguments, message, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  status = exit_status(arguments)
  err = plain(capsys.readouterr().err)
  assert status == 2
  assert message in err and "Traceback" not in err
  assert not list(tmp_path.glob("r*"))  # no run was begun


def exit_status(arguments: list[str]) -> int:
  try:
    return main(arguments)
  except SystemExit as stop:  # tyro's own errors
    return stop.code


def plain(text: str) -> str:
  """One line, without the frames that rich draws."""
  return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", text))


UNKNOWN = [
  (["train", "micro", "--model.layrs", "3"], "--model.layers"),
  (["train", "micro", "--stepz", "3"], "--steps"),
  (["train", "micro", "--model.pattern.0.mixr.N", "8"], "--model.pattern.0.mixer.N"),
  (["train", "micro", "--compute.dtyp", "bfloat16"], "--compute.dtype"),
  (["train", "micro", "--optimizer.name", "adam"], "adamw"),
  (["train", "micro", "--steps", "many"], "steps"),
]


@pytest.mark.parametrize(
  "arguments, nearest",
  UNKNOWN,
  ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unknown_flag_or_choice_comes_with_the_nearest(arguments, nearest, capsys):
  assert exit_status(arguments) == 2
  captured = capsys.readouterr()
  assert nearest in plain(captured.err + captured.out)


def test_a_preset_of_the_users_own(tmp_path, monkeypatch, capsys, corpus):
  """module:function is found in the working directory, names the run, and flags change it."""
  (tmp_path / "mine.py").write_text(
    "import dataclasses\n"
    "from jaxlm.presets import micro\n"
    "def wide():\n"
    "  return dataclasses.replace(micro(), steps=2, log_every=1)\n"
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path])
  flags = ["--steps", "3", "--mesh.data", "1", "--eval_every", "0", "--save_every", "0"]
  flags += ["--data.source", str(corpus)]
  assert main(["train", "mine:wide", *flags, *SMALLER]) == 0
  config = RunFolder(tmp_path / "runs/wide").read_config()
  assert (config.steps, config.log_every, config.model.D) == (3, 1, 16)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, corpus):
  """A run stopped by one Ctrl-C: (folder, exit status, what it printed)."""
  folder = tmp_path_factory.mktemp("interrupted")
  flags = "--steps 100000 --run run --eval_every 0 --save_every 0".split()
  flags += ["--data.source", str(corpus)]
  process = start(folder, "train", "micro", *flags, *SMALLER)
  ours = RunFolder(folder / "run")
  wait_until(lambda: last_step(ours) >= 5, process)
  process.send_signal(signal.SIGINT)
  return ours, *finish(folder, process)


@pytest.mark.slow
def test_ctrl_c_once_saves_and_exits_130(interrupted):
  ours, status, printed = interrupted
  assert status == 130
  step = last_step(ours)
  assert 5 <= step < 100000
  assert f"stopped and saved at step {step} of 100000" in plain(
    printed
  ) and "jaxlm resume run" in plain(printed)
  assert (ours.checkpoints / f"{step:08d}" / "manifest.json").exists()
  assert "Traceback" not in printed


@pytest.mark.slow
def test_resume_finishes_what_was_stopped_and_sample_and_eval_use_it(
  interrupted, monkeypatch, capsys
):
  ours, _, _ = interrupted
  folder = ours.path.parent
  before = list(read_records(ours.metrics))
  last = before[-1]["step"]
  status, printed = run(folder, "resume", "run", "--steps", str(last + 4))
  assert status == 0, printed
  assert f"resuming at step {last}" in plain(printed)
  after = list(read_records(ours.metrics))
  assert after[: len(before)] == before
  assert [record["step"] for record in after] == list(range(1, last + 5))
  assert json.loads(ours.config.read_text())["steps"] == last + 4

  words = "sample run --prompt".split() + ["def f", *"--max_new 12 -n 2".split()]
  monkeypatch.chdir(folder)
  assert main(words) == 0
  printed = capsys.readouterr().out
  assert printed.count("def f") >= 2
  assert main(words) == 0
  assert capsys.readouterr().out == printed  # the seed decides
  assert main(["eval", "run"]) == 0
  printed = capsys.readouterr().out
  found = re.findall(r"^  (\w[\w ]*?) +([\d.]+)$", printed, re.MULTILINE)
  bits = {name: float(value) for name, value in found}
  assert "this model" in bits and len(bits) >= 3 and all(0 < value < 9 for value in bits.values())


@pytest.mark.slow
def test_a_report_of_kernels(tmp_path):
  """A table on the terminal and in the folder, a chart, and what a schedule cannot show."""
  pytest.importorskip("libtpu")
  words = "kernels report --chips v5e --match megablox --out found".split()
  status, printed = run(tmp_path, *words, JAX_PLATFORMS="")
  assert status == 0, printed
  lines = [line for line in printed.splitlines() if line.startswith("| jax megablox gmm")]
  line, units = lines  # in the table of kernels, in that of units
  cells = [cell.strip() for cell in line.strip("|").split("|")]
  assert cells[2] == "v5e" and float(cells[3]) > 0.5 and 80 < float(cells[4].rstrip("%")) < 100
  written = (tmp_path / "found/schedule.md").read_text()
  assert line in written and units in written
  assert "It cannot see" in written and "It cannot see" in printed
  (row,) = json.loads((tmp_path / "found/schedule.json").read_text())["rows"]
  assert {
    "cycles",
    "mxu_use",
    "hbm_bytes",
    "spills",
    "vmem_bytes",
    "us",
    "of_roofline",
  } <= row.keys()
  assert "% of peak" in (tmp_path / "found/schedule.svg").read_text()
