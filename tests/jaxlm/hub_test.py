"""What is named hf:owner/name comes through the Hub's own libraries, from a server of this machine.

What users run beside it is the network alone.
"""

import json
import string

import chex
import pytest
import tokenizers
from huggingface_hub import constants

from benchmarks.reliability.processes import run
from jaxlm.interop import huggingface
from pallas_kernels.common.errors import UserError
from tests.jaxlm.fake_hub import COMMIT, FakeHub

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture
def hub(checkpoint):
  """A Hub with the model owner/name and the dataset owner/set, and files that nobody needs."""
  hub = FakeHub()
  tokens = {token: index for index, token in enumerate(["</s>", *string.printable])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(tokens, []))
  tokenizer.add_special_tokens(["</s>"])
  tokenizer.decoder = tokenizers.decoders.Fuse()
  folder = checkpoint("llama").folder
  hub.repositories["owner/name"] = {
    "config.json": (folder / "config.json").read_bytes(),
    "model.safetensors": (folder / "model.safetensors").read_bytes(),
    "tokenizer.json": tokenizer.to_str().encode(),
    "pytorch_model.bin": b"a pickle",
    "README.md": b"# A model\n",
  }
  records = [json.dumps({"text": f"record {index} of a set"}) for index in range(200)]
  hub.repositories["datasets/owner/set"] = {"train.jsonl": "\n".join(records).encode()}
  yield hub
  hub.shutdown()
  hub.server_close()


def test_a_model_is_downloaded_once_and_found_again_without_the_hub(
  hub, checkpoint, tmp_path, monkeypatch
):
  template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
  monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  config, params = huggingface.load("hf:owner/name")
  assert config == checkpoint("llama").config
  chex.assert_trees_all_equal(params, checkpoint("llama").params)
  fetched = {request.rpartition("/")[2] for request in hub.requests if "GET /owner" in request}
  assert fetched == {"config.json", "model.safetensors", "tokenizer.json"}
  with pytest.raises(UserError, match="hf:owner/other: the Hub does not give it: 404"):
    huggingface.load("hf:owner/other")
  hub.repositories.clear()
  hub.requests.clear()
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  chex.assert_trees_all_equal(huggingface.load("hf:owner/name")[1], params)
  assert not hub.requests


def on(hub: FakeHub, tmp_path, *arguments: str) -> tuple[int, str]:
  """Runs `jaxlm` in a process whose Hub is this one."""
  return run(tmp_path, *arguments, HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "hub"))


@pytest.mark.slow
def test_a_model_is_sampled_and_one_that_is_not_there_is_one_line(hub, tmp_path):
  status, printed = on(hub, tmp_path, "sample", "hf:owner/name", "--prompt", "abc")
  assert status == 0 and "\nabc" in printed, printed
  status, printed = on(hub, tmp_path, "sample", "hf:owner/other")
  assert status == 2
  (line,) = printed.splitlines()
  assert line.startswith("jaxlm: hf:owner/other: the Hub does not give it: 404 Client Error. Repo")


@pytest.mark.slow
def test_a_dataset_is_streamed_into_a_store(hub, tmp_path):
  pytest.importorskip("datasets")
  status, printed = on(hub, tmp_path, "tokenize", "hf:owner/set", "store")
  assert status == 0 and "hf:owner/set: 200 documents" in printed, printed
  assert f"revision {COMMIT}" in printed
  status, printed = on(hub, tmp_path, "tokenize", "hf:owner/set", "store")
  assert status == 0 and "is finished; its digests are verified" in printed, printed
  status, printed = on(hub, tmp_path, "tokenize", "hf:owner/set:validation", "other")
  assert status == 2 and "Bad split: validation" in printed.splitlines()[-1], printed
  assert not (tmp_path / "other").exists()
