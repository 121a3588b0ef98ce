"""Damaged folders: loading gives a model or a ValueError, soon and without much memory."""

import copy
import json
import random
import shutil
import struct
import time
import tracemalloc

import jax
import numpy as np
import pytest

from jaxlm.interop import huggingface

ODD = [
  None,
  True,
  False,
  0,
  1,
  -1,
  2,
  3,
  7,
  2**31 - 1,
  2**31,
  2**63,
  2**64,
  10**30,
  0.0,
  0.5,
  -2.5,
  1e-300,
  1e300,
]
ODD += [
  "",
  "llama",
  "F32",
  "BF16",
  "I8",
  "yarn",
  "a" * 5000,
  [],
  [0],
  [1, 2],
  [[]],
  [-1, 4],
  ["x"],
  {},
  {"a": 1},
]
SECONDS = 5.0


def nodes(value, found):
  """Every (container, key) below a JSON value."""
  items = (
    value.items()
    if isinstance(value, dict)
    else enumerate(value)
    if isinstance(value, list)
    else ()
  )
  for key, child in items:
    found.append((value, key))
    nodes(child, found)
  return found


def edit(value, draw):
  """A copy with one to three random edits: values, entries missing or doubled, other keys."""
  value = copy.deepcopy(value)
  for _ in range(draw.choice((1, 1, 2, 3))):
    places = nodes(value, [])
    if not places:
      break
    container, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
      del container[key]
    elif kind == 1 and isinstance(container[key], (int, float)):
      container[key] += draw.choice((-8, -4, -1, 1, 4, 8, 10**6))
    elif kind == 2:
      other, other_key = draw.choice(places)
      container[key] = copy.deepcopy(other[other_key]) if other_key in range_of(other) else None
    elif kind == 3 and isinstance(container, dict):
      container[key + draw.choice(("s", "_", ""))] = container.pop(key)
    else:
      container[key] = copy.deepcopy(draw.choice(ODD))
  return value


def range_of(container):
  return container if isinstance(container, dict) else range(len(container))


def scramble(text, draw):
  """Bytes with some of them changed, cut out, or repeated."""
  text = bytearray(text)
  for _ in range(draw.choice((1, 1, 2, 8))):
    at = draw.randrange(len(text))
    match draw.randrange(3):
      case 0:
        text[at] = draw.randrange(256)
      case 1:
        del text[at : at + draw.randrange(1, 40)]
      case 2:
        text[at:at] = text[at : at + draw.randrange(1, 40)]
    if not text:
      break
  return bytes(text)


def with_header(text, data):
  return struct.pack("<Q", len(text)) + text + data


def damaged(config, header, data, draw):
  """(config.json, model.safetensors) with one of them damaged; bytes."""
  config_text, header_text = json.dumps(config).encode(), json.dumps(header).encode()
  match draw.randrange(6):
    case 0:
      return json.dumps(edit(config, draw)).encode(), with_header(header_text, data)
    case 1:
      return scramble(config_text, draw), with_header(header_text, data)
    case 2:
      return config_text, with_header(json.dumps(edit(header, draw)).encode(), data)
    case 3:
      return config_text, with_header(scramble(header_text, draw), data)
    case 4:
      return config_text, with_header(header_text, data)[
        : draw.randrange(8 + len(header_text) + len(data))
      ]
    case _:
      length = draw.choice(
        (
          0,
          1,
          len(header_text) - 1,
          len(header_text) + 1,
          2**31,
          2**63,
          2**64 - 1,
          draw.getrandbits(20),
        )
      )
      return config_text, struct.pack("<Q", length) + header_text + data


@pytest.fixture(params=["qwen2", "gemma2"])
def original(request, checkpoint):
  """(config, header, data) of a checkpoint, in the layout of transformers 4 and 5 by turns."""
  folder = checkpoint(request.param).folder
  raw = (folder / "model.safetensors").read_bytes()
  (length,) = struct.unpack("<Q", raw[:8])
  layout = "config.json" if request.param == "qwen2" else "config_v5.json"
  return (
    json.loads((folder / layout).read_text()),
    json.loads(raw[8 : 8 + length]),
    raw[8 + length :],
  )


def fuzz(original, folder, seed, count):
  """Returns what is accepted; fails on anything but ValueError, on slowness, and on memory.

  Memory is measured in every fourth case, because measuring takes twice the time of the rest.
  """
  draw = random.Random(seed)
  weights = folder / "model.safetensors"
  loadable = {}
  try:
    for index in range(count):
      config_text, weight_bytes = damaged(*original, draw)
      (folder / "config.json").write_bytes(config_text)
      weights.write_bytes(weight_bytes)
      limit = 2 * (len(weight_bytes) + len(config_text)) + (1 << 18)
      del weight_bytes
      if index % 4 == 0:
        tracemalloc.start()
      before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
      try:
        config, tensors, kind = huggingface.inspect(folder)
        loadable.setdefault(config, (config_text, weights.read_bytes()))
        assert sum(entry.stop - entry.start for entry in tensors.values()) < weights.stat().st_size
      except ValueError as error:
        assert str(folder) in str(error), error
      assert time.perf_counter() - start < SECONDS
      assert tracemalloc.get_traced_memory()[1] - before < limit  # both 0 where it is not measured
      tracemalloc.stop()
  finally:
    tracemalloc.stop()
  return loadable


def load_all(loadable, folder):
  """What the headers let through loads as the model that it says, or the model refuses it."""
  loaded = 0
  for config, (config_text, weight_bytes) in loadable.items():
    (folder / "config.json").write_bytes(config_text)
    (folder / "model.safetensors").write_bytes(weight_bytes)
    try:
      found, params = huggingface.load(folder)
    except ValueError as error:
      assert str(folder) in str(error)
      continue
    assert found == config
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) < 2 * len(weight_bytes)
    loaded += 1
  return loaded


def test_damaged_folders(original, tmp_path):
  accepted = fuzz(original, tmp_path, seed=0, count=300)
  assert 0 < len(accepted) < 60
  assert load_all(dict(list(accepted.items())[:6]), tmp_path) > 0


@pytest.mark.slow
def test_ten_thousand_damaged_folders(original, tmp_path):
  accepted = fuzz(original, tmp_path, seed=1, count=5000)
  assert load_all(accepted, tmp_path) > 10


def test_damaged_index(checkpoint, tmp_path):
  c = checkpoint("qwen3")
  huggingface.save(tmp_path / "split", c.config, c.params, max_file_bytes=60_000)
  index = tmp_path / "split" / "model.safetensors.index.json"
  whole, draw, accepted = json.loads(index.read_text()), random.Random(2), 0
  for _ in range(200):
    index.write_bytes(
      json.dumps(edit(whole, draw)).encode()
      if draw.random() < 0.7
      else scramble(index.read_bytes(), draw)
    )
    try:
      accepted += len(huggingface.inspect(tmp_path / "split")[1]) > 0
    except ValueError as error:
      assert str(tmp_path) in str(error)
    index.write_text(json.dumps(whole))
  assert accepted < 150
  assert len(huggingface.inspect(tmp_path / "split")[1]) == len(whole["weight_map"])


def test_undamaged_folder_is_accepted(original, checkpoint, tmp_path):
  config, header, data = original
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "model.safetensors").write_bytes(with_header(json.dumps(header).encode(), data))
  _, tensors, kind = huggingface.inspect(tmp_path)
  assert set(tensors) == set(header) - {"__metadata__"} and kind == np.float32
  shutil.rmtree(tmp_path)
  with pytest.raises(ValueError, match="no such folder"):
    huggingface.load(tmp_path)
