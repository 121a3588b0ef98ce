"""Finds the folder of a checkpoint: on this machine, or from the Hub as `hf:owner/name`."""

from __future__ import annotations

import re
from pathlib import Path

from jaxlm.interop.strict_json import read_object
from jaxlm.paths import local_path
from pallas_kernels.common.errors import UserError, import_extra

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
HUB_PREFIX = "hf:"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DOWNLOADED_FILES = ["*.json", "*.safetensors"]
_RULE = f"no such folder; a model on the Hub is named {HUB_PREFIX}owner/name"


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


def is_checkpoint(path: str | Path) -> bool:
  """Returns whether `path` names a Hub model or is a folder in the Hub's layout.

  Raises UserError for a folder that does not exist.
  """
  if str(path).startswith(HUB_PREFIX):
    return True
  config = local_folder(path) / CONFIG
  return config.is_file() and "model_type" in read_object(config, MAX_CONFIG_BYTES)
