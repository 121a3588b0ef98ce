"""Finds the folder of a checkpoint: on this machine, or from the Hub as `hf:owner/name`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.interop.strict_json import read_object
from jaxlm.paths import is_address, local_path
from pallas_kernels.common.errors import UserError, import_extra

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
HUB_PREFIX = "hf:"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DOWNLOADED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"]
_OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
ADAPTER = "adapter_config.json"
_RULE = f"no such folder; a model on the Hub is named {HUB_PREFIX}owner/name"


class Ignored(NamedTuple):
  """Names what of a checkpoint is read as if it were not there."""

  config: tuple[str, ...] = ()
  """fields of config.json: a key, or outer.inner"""
  tensors: tuple[str, ...] = ()
  """tensors that are no weights of the model: names, or patterns with * and ?"""


NOTHING = Ignored()


def local_folder(path: str | Path) -> Path:
  """Returns the folder `path`, or downloads `hf:owner/name` (extra `hf`) and returns its folder.

  Only the prefix leads to a request. Raises UserError, naming `path` and the rule, for a folder
  that does not exist, a malformed Hub name, and a model that the Hub does not give.
  """
  if not str(path).startswith(HUB_PREFIX):
    folder = local_path(path, "checkpoint")
    if not folder.is_dir():
      raise UserError(f"{path}: {_RULE}")
    return folder
  repository = str(path).removeprefix(HUB_PREFIX)
  if not _REPOSITORY.fullmatch(repository):
    raise UserError(f"{path}: must be {HUB_PREFIX}owner/name")
  hub = import_extra("huggingface_hub", "hf", f"{path}: downloading from the Hub")
  try:
    return Path(hub.snapshot_download(repository, allow_patterns=_DOWNLOADED_FILES))
  except (OSError, ValueError) as error:  # no network, no such model, no permission
    raise UserError(f"{path}: the Hub does not give it: {error}") from error


def find_tokenizer(folder: Path) -> Path:
  """Returns the tokenizer.json of a checkpoint.

  Raises UserError where there is none, with what there is instead.
  """
  path = folder / TOKENIZER_FILE
  if path.is_file():
    return path
  others = [name for name in _OTHER_TOKENIZERS if (folder / name).is_file()]
  instead = ""
  if others:
    code = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers"
    instead = f"; {code} makes one of {' and '.join(others)}"
  raise UserError(f"{folder}: there is no {TOKENIZER_FILE}{instead}")


def is_checkpoint(path: str | Path) -> bool:
  """Returns whether `path` names a Hub model or is a folder in the Hub's layout.

  Raises UserError for a folder that does not exist, and for one that holds only an adapter.
  """
  if str(path).startswith(HUB_PREFIX):
    return True
  if is_address(path):
    return False  # on object stores are runs alone
  config = local_folder(path) / CONFIG
  if not config.exists() and (config.parent / ADAPTER).is_file():
    rule = "holds an adapter (LoRA), not a model; merge it into its base model first"
    raise UserError(f"{path}: {rule}")
  return config.is_file() and "model_type" in read_object(config, MAX_CONFIG_BYTES)
