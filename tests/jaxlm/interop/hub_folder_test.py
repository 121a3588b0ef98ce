"""A Hub model is named hf:owner/name; every other name is a folder of this machine."""

import shutil

import huggingface_hub
import pytest

from jaxlm.cli import main
from jaxlm.interop import huggingface
from jaxlm.run.convert import convert
from jaxlm.run.saved_run import SavedRun
from pallas_kernels.common.errors import MissingExtraError, UserError


@pytest.fixture
def requests(monkeypatch, checkpoint, tmp_path):
  """Records what is asked of the Hub, which gives the model owner/name and nothing else."""
  asked = []

  def download(repository, allow_patterns):
    asked.append(repository)
    if repository != "owner/name":
      raise OSError("404: no such model")
    return str(shutil.copytree(checkpoint("llama").folder, tmp_path / "cache"))

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  return asked


def test_the_prefix_downloads(requests, checkpoint):
  config, _ = huggingface.load("hf:owner/name")
  assert config == checkpoint("llama").config
  assert requests == ["owner/name"]
  assert huggingface.is_checkpoint("hf:owner/other") and requests == ["owner/name"]


def test_what_the_hub_does_not_give_is_named(requests):
  with pytest.raises(UserError, match="hf:owner/other: the Hub does not give it: 404"):
    huggingface.load("hf:owner/other")


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a/b/c", "hf:../x", "hf:a b/c", "hf:/etc"])
def test_malformed_hub_names(name, requests):
  with pytest.raises(UserError, match=f"{name}: must be hf:owner/name"):
    huggingface.load(name)
  assert not requests


@pytest.mark.parametrize("name", ["runs/mien", "owner/name", "/no/such/folder", "a b/c", "mien"])
@pytest.mark.parametrize("use", [huggingface.load, SavedRun.open, lambda name: convert(name, "x")])
def test_a_mistyped_folder_is_no_request(name, use, requests, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=f"{name}: no such folder; a model on the Hub is named hf:"):
    use(name)
  assert not requests and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "command",
  [
    ["sample", "runs/mien"],
    ["eval", "runs/mien"],
    ["convert", "runs/mien", "out"],
    ["train", "micro", "--init", "runs/mien", "--run", "new"],
  ],
  ids=lambda command: command[0],
)
def test_commands_name_the_mistyped_folder(command, requests, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(command) == 2
  assert "runs/mien: no such folder; a model on the Hub" in capsys.readouterr().err
  assert not requests and not list(tmp_path.iterdir())


def test_without_the_extra_the_error_names_it(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
  with pytest.raises(MissingExtraError, match=r"hf:owner/name: .*pip install 'jaxlm\[hf\]'"):
    huggingface.load("hf:owner/name")
