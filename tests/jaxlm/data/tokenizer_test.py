import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from jaxlm.config import DataConfig
from jaxlm.data import formats
from jaxlm.data import tokenizer as module
from jaxlm.data.arrays import read_blocks
from jaxlm.data.cache import open_text
from jaxlm.data.formats import PIECE, cut_pieces
from jaxlm.data.tokenizer import (
  BPETokenizer,
  ByteTokenizer,
  Excerpt,
  load_tokenizer,
  make_tokenizer,
  train_bpe,
)

SOURCE = Path(module.__file__).read_text()


@pytest.fixture(scope="module")
def bpe():
  return train_bpe([SOURCE], 500)


@given(text=st.text())
def test_bytes_round_trip(text):
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text and ids.tobytes() == text.encode()
  assert (tokenizer.eos in ids) == ("\0" in text)


def test_bytes_that_are_not_utf8_are_replaced():
  assert ByteTokenizer().decode([*b"caf", 0xC3]) == "caf\ufffd"
  with pytest.raises(ValueError):
    ByteTokenizer().decode([256])


@given(text=st.text(st.characters(codec="utf-8")))
@example(text="a <|endoftext|> in the text")
@example(text="  \n\n two  spaces\t\r\n")
def test_bpe_round_trip(bpe, text):
  ids = bpe.encode(text)
  assert bpe.decode(ids) == text
  assert bpe.eos not in ids and all(0 <= id < bpe.vocab_size for id in ids.tolist())


@given(text=st.text("ab \né€", max_size=60), size=st.integers(4, 9), block=st.integers(1, 9))
def test_pieces_join_to_the_text_and_are_short(text, size, block):
  raw = text.encode()
  blocks = [raw[start : start + block] for start in range(0, len(raw), block)]
  parts = list(cut_pieces(blocks, size))
  assert b"".join(piece for piece, _ in parts) == raw
  assert all(0 < len(piece) <= size and piece.decode() for piece, _ in parts[:-1])
  assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
  assert parts == list(cut_pieces([raw], size))
  # Reading goes on from any border with the same pieces.
  assert parts[1:] == (list(cut_pieces([raw[len(parts[0][0]) :]], size)) if len(parts) > 1 else [])


def other_models():
  """Tokenizers that put a space before a text, as SentencePiece does, in two ways."""
  lines = SOURCE.splitlines(keepends=True)
  for way in ("normalizer", "pre-tokenizer"):
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    if way == "normalizer":  # Llama 2
      prepend = tokenizers.normalizers.Prepend("▁")
      replace = tokenizers.normalizers.Replace(" ", "▁")
      model.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    else:
      model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    specials = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=600, special_tokens=specials, show_progress=False
    )
    model.train_from_iterator(lines, trainer)
    yield BPETokenizer(model)


@pytest.mark.parametrize("piece", [300, 1000])
def test_ids_of_pieces_are_those_of_the_whole_text(bpe, tmp_path, monkeypatch, piece):
  """As the library gives them for each document at once, also where it puts a space before it."""
  monkeypatch.setattr(formats, "PIECE", piece)
  lines = "".join(f"  line {i}, with\n\n\tan indented one; \n()\n" for i in range(90))
  texts = [lines, lines.replace("\n", "\r\n"), "é€😀 und mehr\n" * 90, "short"]
  for name, text in zip(("0", "1", "2", "val"), texts):  # so that none is cut
    (tmp_path / f"{name}.txt").write_text(text, newline="")
  config = DataConfig(source=str(tmp_path))
  for tokenizer in (bpe, *other_models()):
    stored = open_text(config, tokenizer)
    got = list[list[int]]()
    for side in (stored.train, stored.heldout):
      ids = np.concatenate(list(read_blocks(side.tokens)))
      borders = np.concatenate(list(read_blocks(side.borders)))
      got += [ids[a + 1 : b].tolist() for a, b in zip(borders[:-1], borders[1:])]
    expected = [tokenizer.model.encode(text, add_special_tokens=False).ids for text in texts]
    assert sorted(got) == sorted(expected)


def test_bpe_is_shorter_than_bytes_and_of_the_size_asked_for(bpe):
  assert (bpe.vocab_size, bpe.eos) == (500, 0)
  assert len(bpe.encode(SOURCE)) < 0.6 * len(SOURCE)
  assert bpe.encode(SOURCE).dtype == np.uint16


def test_bpe_training_repeats(bpe):
  assert train_bpe([SOURCE], 500).model.to_str() == bpe.model.to_str()


def test_encode_all_equals_encode_whatever_the_batches(bpe, monkeypatch):
  texts = ["", SOURCE, "a", SOURCE[:500], ""]
  expected = [bpe.encode(text) for text in texts]
  texts = [Excerpt(text) for text in texts]
  monkeypatch.setattr(module, "BATCH", 2)
  for got, ids in zip(bpe.encode_all(texts), expected, strict=True):
    np.testing.assert_array_equal(got, ids)


def test_long_text_round_trips(bpe):
  text = SOURCE * 20 + "x" * 100_000
  assert len(text) > 5 * PIECE and bpe.decode(bpe.encode(text)) == text


def test_truncation_and_padding_of_the_file_are_switched_off(bpe, tmp_path):
  model = tokenizers.Tokenizer.from_str(bpe.model.to_str())
  model.enable_truncation(4)
  model.enable_padding(length=10)
  model.save(str(tmp_path / "tokenizer.json"))
  tokenizer = BPETokenizer.load(tmp_path / "tokenizer.json")
  for text in (SOURCE, "short"):
    np.testing.assert_array_equal(tokenizer.encode(text), bpe.encode(text))


@pytest.mark.parametrize("how", ["bytes", "bpe:300", "file"])
def test_a_run_folder_gives_the_tokenizer_back(bpe, tmp_path, how):
  bpe.model.save(str(tmp_path / "given.json"))
  config = DataConfig(tokenizer=str(tmp_path / "given.json") if how == "file" else how)
  tokenizer = make_tokenizer(config, [SOURCE])
  (tmp_path / "run").mkdir()
  tokenizer.save(tmp_path / "run")
  (tmp_path / "given.json").unlink()
  again = load_tokenizer(tmp_path / "run", config)
  assert (again.vocab_size, again.eos) == (tokenizer.vocab_size, tokenizer.eos)
  np.testing.assert_array_equal(again.encode(SOURCE), tokenizer.encode(SOURCE))


@pytest.mark.parametrize("token", ["<|end_of_text|>", "<eos>", "</s>"])
def test_other_ends_of_text_and_gaps_in_the_ids(bpe, tmp_path, token):
  model = json.loads(bpe.model.to_str().replace("<|endoftext|>", token))
  model["added_tokens"].append(dict(model["added_tokens"][0], id=900, content="<extra>"))
  model["model"]["vocab"]["<extra>"] = 900
  (tmp_path / "t.json").write_text(json.dumps(model))
  tokenizer = BPETokenizer.load(tmp_path / "t.json")
  assert (tokenizer.eos, tokenizer.vocab_size) == (0, 901)


def test_errors_name_the_file_and_the_rule(bpe, tmp_path):
  with pytest.raises(
    ValueError, match=r"data.tokenizer='gpt2': no such file \(or bytes, or bpe:SIZE\)"
  ):
    make_tokenizer(DataConfig(tokenizer="gpt2"), [])
  with pytest.raises(ValueError, match="run/tokenizer.json': no such file"):
    load_tokenizer(tmp_path / "run", DataConfig(tokenizer="bpe:300"))
  path = tmp_path / "t.json"
  path.write_text("{}")
  with pytest.raises(ValueError, match="t.json': not a tokenizer.json"):
    BPETokenizer.load(path)
  path.write_text(bpe.model.to_str().replace("<|endoftext|>", "<stop>"))
  with pytest.raises(
    ValueError, match=r"t.json': no end-of-text token, it must have one of <\|endoftext\|>"
  ):
    BPETokenizer.load(path)
  with pytest.raises(
    ValueError, match=r"data.tokenizer='bpe:400': .* only 25[89] tokens, bpe:25[89] at most"
  ):
    train_bpe(["abab"], 400)
