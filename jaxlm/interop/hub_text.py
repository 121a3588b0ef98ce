"""Reads and writes what a checkpoint says of its text: tokenizer, start, end, padding, generation.

The files are those of transformers. What a published folder holds is kept as it is, so that it
passes through a run unchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.data.tokenizer import Tokenizer, as_library_tokenizer
from jaxlm.interop.hub_folder import CONFIG, MAX_CONFIG_BYTES
from jaxlm.interop.strict_json import read_object

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
_FILES = (
  TOKENIZER_FILE,
  TOKENIZER_CONFIG,
  GENERATION_CONFIG,
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "tokenizer.model",
  "vocab.json",
  "merges.txt",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The class that takes tokenizer.json as it is; every other one changes it when it loads.
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"


class TextFiles(NamedTuple):
  """Holds what an exported checkpoint says of its text."""

  files: dict[str, bytes]
  """name -> content, all but config.json"""
  token_ids: dict[str, Any]
  """bos, eos and pad of config.json"""


NO_TEXT_FILES = TextFiles({}, {})


def read_published(folder: Path) -> dict[str, bytes]:
  """Returns the files of a checkpoint that say what its text is, by name; config.json is one."""
  paths = [folder / name for name in (CONFIG, *_FILES)]
  return {path.name: path.read_bytes() for path in paths if path.is_file()}


def read_end_ids(folder: Path, V: int) -> tuple[int, ...]:
  """Returns the ids at which generation ends, as transformers reads them; () if none is named.

  That is eos_token_id of generation_config.json, else of config.json: an id or several. What is no
  id below `V` is left out.
  """
  for name in (GENERATION_CONFIG, CONFIG):
    if (folder / name).is_file():
      eos = read_object(folder / name, MAX_CONFIG_BYTES).get("eos_token_id")
      ids = eos if isinstance(eos, list) else [eos]
      ends = [id for id in ids if type(id) is int and 0 <= id < V]
      if ends:
        return tuple(dict.fromkeys(ends))
  return ()


def make_text_files(tokenizer: Tokenizer, V: int, max_length: int) -> TextFiles:
  """Returns what a checkpoint of `V` ids says, whose texts start and end with the tokenizer's eos.

  Ids without a text are named in generation_config.json, which keeps them from being drawn.
  """
  model = as_library_tokenizer(tokenizer)
  end = model.id_to_token(tokenizer.eos)
  token_ids = dict.fromkeys(_TOKEN_IDS, tokenizer.eos)
  without_text = sorted({*range(V)} - {*tokenizer.list_ids().tolist()})
  suppressed = {"suppress_tokens": without_text} if without_text else {}
  tokenizer_config = {
    "tokenizer_class": _TOKENIZER_CLASS,
    "bos_token": end,
    "eos_token": end,
    "pad_token": end,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": max_length,
  }
  files = {
    TOKENIZER_FILE: model.to_str(pretty=True).encode(),
    TOKENIZER_CONFIG: _to_json(tokenizer_config),
    GENERATION_CONFIG: _to_json(token_ids | suppressed),
  }
  return TextFiles(files, token_ids)


def keep_text_files(published: Path, eos: int, V: int) -> TextFiles:
  """Returns the files of the folder `published`, and the ids that its config.json names.

  `eos`, which ended the documents of a run, becomes one of the ends if it is none of them.
  """
  files = read_published(published)
  values = json.loads(files.pop(CONFIG)) if CONFIG in files else {}
  token_ids = {name: values[name] for name in _TOKEN_IDS if values.get(name) is not None}
  ends = read_end_ids(published, V)
  if GENERATION_CONFIG not in files or eos not in ends:
    more = {} if eos in ends else {"eos_token_id": [*ends, eos] if ends else eos}
    token_ids |= more
    generation = json.loads(files.get(GENERATION_CONFIG, b"{}"))
    files[GENERATION_CONFIG] = _to_json(token_ids | generation | more)
  return TextFiles(files, token_ids)


def _to_json(values: dict[str, Any]) -> bytes:
  return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
