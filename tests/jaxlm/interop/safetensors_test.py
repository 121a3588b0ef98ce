"""Headers that lie: each is refused with file, tensor and rule, before anything is read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from jaxlm.interop import safetensors
from jaxlm.interop.safetensors import MappedFile, read_header
from jaxlm.interop.strict_json import parse_object
from jaxlm.interop.weight_files import find_tensors, plan_files

GOOD = {
  "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
  "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
SIZE = 32


def write_raw(path, header, data=b"\0" * SIZE, length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
  return path


def edited(name, **changes):
  return GOOD | {name: GOOD[name] | changes}


def test_written_files_read_back_also_by_the_library(tmp_path):
  library = pytest.importorskip("safetensors.numpy")
  draw = np.random.default_rng(0)
  arrays = {
    "x.weight": draw.normal(size=(3, 5)).astype(np.float32),
    "half": draw.normal(size=7).astype(np.float16),
    "brain": draw.normal(size=(2, 1, 2)).astype(ml_dtypes.bfloat16),
  }
  path = tmp_path / "model.safetensors"
  safetensors.write(
    path, {name: (x.dtype, x.shape) for name, x in arrays.items()}, arrays.__getitem__
  )
  file = MappedFile(path)
  found = {name: file.view(entry) for name, entry in read_header(path).items()}
  for other in (found, library.load_file(path)):
    assert other.keys() == arrays.keys()
    for name, x in arrays.items():
      assert other[name].dtype == x.dtype and other[name].shape == x.shape
      assert other[name].tobytes() == x.tobytes()
  assert not found["half"].flags.writeable


@pytest.mark.parametrize(
  "header, rule",
  [
    (
      edited("a", data_offsets=[0, 20]),
      r"tensor 'a': data_offsets \[0, 20\] span 20 bytes, F32 \[2, 3\] takes 24",
    ),
    (edited("a", shape=[2, 2]), "tensor 'a'.*takes 16"),
    (edited("a", shape=[2, -3]), "tensor 'a': shape must be"),
    (edited("a", shape=[2, 3.0]), "tensor 'a': shape must be"),
    (edited("a", shape=[2, True]), "tensor 'a': shape must be"),
    (edited("a", shape=[1 << 60, 0]), "tensor 'a': shape must be"),
    (edited("a", shape=[1] * 9), "tensor 'a': shape must be"),
    (edited("a", shape="23"), "tensor 'a': shape must be"),
    (edited("a", dtype="F4"), "tensor 'a': dtype 'F4' is not one of F32, F16, BF16"),
    (edited("a", dtype=["F32"]), "tensor 'a': dtype"),
    (
      edited("b", data_offsets=[16, 24]),
      "tensor 'b': data_offsets begin at 16, which overlaps the tensor before it",
    ),
    (
      edited("b", data_offsets=[28, 36]),
      "tensor 'b': data_offsets begin at 28, which leaves 4 bytes unused",
    ),
    (edited("b", data_offsets=[32, 24]), "tensor 'b'.*span -8 bytes"),
    (edited("b", data_offsets=[24]), "tensor 'b': data_offsets must be two"),
    (edited("b", data_offsets=[24, 32, 32]), "tensor 'b': data_offsets must be two"),
    (edited("b", data_offsets=[-8, 0]), "tensor 'b': data_offsets must be two"),
    (edited("b", extra=1), "tensor 'b': must have dtype, shape and data_offsets, and nothing else"),
    (GOOD | {"c": 5}, "tensor 'c': must have dtype"),
    (
      GOOD | {"c": {"dtype": "F32", "shape": [1], "data_offsets": [32, 36]}},
      "tensor 'c': ends at byte",
    ),
    ({"a": GOOD["a"]}, "8 bytes after the last tensor"),
    (GOOD | {"__metadata__": {"format": 5}}, "__metadata__ must map names to strings"),
    (GOOD | {"__metadata__": "pt"}, "__metadata__ must map names to strings"),
    ([GOOD], "must hold one JSON object"),
    (json.dumps(GOOD).replace('"b"', '"a"').encode(), "duplicate name 'a'"),
    (
      b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], "shape": [3, 2]}}',
      "duplicate name 'shape'",
    ),
    (b"{" * 100_000, "nested too deeply|not valid JSON"),
    (b'{"a":' * 100_000, "nested too deeply|not valid JSON"),
    (b"[" * 100_000, "nested too deeply|not valid JSON"),
    (b'{"a": NaN}', "NaN is not a JSON number"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b"", "not valid JSON"),
  ],
)
def test_header_that_lies(header, rule, tmp_path):
  path = write_raw(tmp_path / "bad.safetensors", header)
  with pytest.raises(ValueError, match=rule) as error:
    read_header(path)
  assert str(path) in str(error.value)


def test_sound_header(tmp_path):
  path = write_raw(tmp_path / "good.safetensors", GOOD)
  entries = read_header(path)
  data = 8 + len(json.dumps(GOOD))
  assert {name: entry[2:] for name, entry in entries.items()} == {
    "a": ((2, 3), data, data + 24),
    "b": ((4,), data + 24, data + 32),
  }


@pytest.mark.parametrize("size", [0, 7, 8, 20, -1])
def test_truncated_file(size, tmp_path):
  path = write_raw(tmp_path / "bad.safetensors", GOOD)
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(ValueError, match=str(path)):
    read_header(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 1 << 25])
def test_header_of_gigabytes_is_not_read(length, tmp_path):
  path = write_raw(tmp_path / "bad.safetensors", GOOD, length=length)
  with path.open("ab") as file:
    file.truncate(1 << 26)  # sparse, and longer than one of the lengths
  with pytest.raises(
    ValueError, match=r"header of [\d,]+ bytes, (but the file has|over 1,048,576 and 0.0625)"
  ):
    read_header(path)


def index_folder(folder, weight_map, files=("one", "two")):
  folder.mkdir(exist_ok=True)
  for name, tensor in zip(files, "ab"):
    entry = GOOD[tensor]
    start, stop = entry["data_offsets"]
    shifted = entry | {"data_offsets": [0, stop - start]}
    write_raw(folder / f"{name}.safetensors", {tensor: shifted}, b"\0" * (stop - start))
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": {}, "weight_map": weight_map})
  )
  return folder


def test_indexed_files(tmp_path):
  folder = index_folder(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
  assert {name: entry.file.name for name, entry in find_tensors(folder).items()} == {
    "a": "one.safetensors",
    "b": "two.safetensors",
  }


@pytest.mark.parametrize(
  "weight_map, rule",
  [
    (
      {"a": "../one.safetensors", "b": "two.safetensors"},
      "must be the plain name of a .safetensors file",
    ),
    ({"a": "/tmp/one.safetensors", "b": "two.safetensors"}, "must be the plain name"),
    ({"a": "..\\one.safetensors", "b": "two.safetensors"}, "must be the plain name"),
    ({"a": "one.bin", "b": "two.safetensors"}, "must be the plain name"),
    ({"a": 5, "b": "two.safetensors"}, "must be the plain name"),
    (
      {"a": "one.safetensors", "b": "three.safetensors"},
      "names 'three.safetensors', which does not exist",
    ),
    ({"a": "one.safetensors", "b": "one.safetensors"}, "tensor 'b' is not in 'one.safetensors'"),
    ({"a": "two.safetensors", "b": "two.safetensors"}, "tensor 'a' is not in 'two.safetensors'"),
    ({"b": "one.safetensors", "a": "two.safetensors"}, "tensor 'a' is not where"),
    (
      {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
      "tensor 'c' is not in",
    ),
    ({"a": "one.safetensors", "c": "two.safetensors"}, "tensor 'b' is not where"),
    ({}, "weight_map must map"),
    ([], "weight_map must map"),
  ],
)
def test_index_that_lies(weight_map, rule, tmp_path):
  with pytest.raises(ValueError, match=rule):
    find_tensors(index_folder(tmp_path, weight_map))


def test_a_tensor_in_two_files(tmp_path):
  folder = index_folder(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
  write_raw(folder / "two.safetensors", GOOD)
  with pytest.raises(ValueError, match="two.safetensors: tensor 'a' is also in one.safetensors"):
    find_tensors(folder)


def test_folders_without_one_definite_set_of_weights(tmp_path):
  with pytest.raises(ValueError, match="holds neither model.safetensors nor"):
    find_tensors(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
  with pytest.raises(ValueError, match="pytorch_model.bin may run code when read"):
    find_tensors(tmp_path)
  index_folder(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
  write_raw(tmp_path / "model.safetensors", GOOD)
  with pytest.raises(ValueError, match="names one.safetensors, but model.safetensors is there too"):
    find_tensors(tmp_path)


def test_an_index_of_the_single_file_is_as_good_as_none(tmp_path):
  index_folder(tmp_path, dict.fromkeys("ab", "model.safetensors"), ())
  write_raw(tmp_path / "model.safetensors", GOOD)
  assert set(find_tensors(tmp_path)) == {"a", "b"}
  index_folder(tmp_path, {"b": "model.safetensors"}, ())
  with pytest.raises(ValueError, match="tensor 'a' is not where"):
    find_tensors(tmp_path)


def test_files_are_filled_in_order_up_to_the_limit():
  sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 1}
  assert list(plan_files(sizes, 7)) == [["a", "b"], ["c"], ["d", "e"]]
  assert list(plan_files(sizes, 100)) == [list("abcde")]


def test_json_of_a_file_must_be_an_object():
  assert parse_object(b'{"a": [1, {"b": null}]}', "here") == {"a": [1, {"b": None}]}
  with pytest.raises(ValueError, match="^here: must hold one JSON object"):
    parse_object(b"3", "here")
