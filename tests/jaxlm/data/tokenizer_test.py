import functools
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


@given(
  text=st.text("ab \né€。\r\u3000", max_size=60),
  size=st.integers(4, 9),
  more=st.integers(0, 9),
  block=st.integers(1, 9),
)
def test_pieces_join_to_the_text_and_are_short(text, size, more, block):
  raw = text.encode()
  blocks = [raw[start : start + block] for start in range(0, len(raw), block)]
  parts = list(cut_pieces(blocks, size, size + more))
  assert b"".join(piece for piece, _ in parts) == raw
  assert all(0 < len(piece) <= size + more and piece.decode() for piece, _ in parts[:-1])
  assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
  assert parts == list(cut_pieces([raw], size, size + more))
  # Reading goes on from any border with the same pieces.
  rest = raw[len(parts[0][0]) :]
  assert parts[1:] == (list(cut_pieces([rest], size, size + more)) if len(parts) > 1 else [])


CL100K = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WAYS = ("normalizer", "first", "always", "never", "cl100k", "added")


@functools.cache
def other_model(way):
  """A tokenizer as SentencePiece's, with and without a space before a text, or as GPT-4's."""
  lines = [*SOURCE.splitlines(keepends=True), *["你好。我们走吧！\n"] * 20]
  model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=way not in ("cl100k", "added")))
  specials = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  alphabet = list[str]()
  pre, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
  if way in ("cl100k", "added"):
    specials, alphabet = ["</s>"], pre.ByteLevel.alphabet()
    split = pre.Split(tokenizers.Regex(CL100K), "isolated")
    bytes_of = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer, model.decoder = pre.Sequence([split, bytes_of]), decoders.ByteLevel()
  else:
    scheme = "always" if way == "normalizer" else way
    model.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme)
    strip = [] if way == "never" else [decoders.Strip(" ", 1, 0)]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    model.decoder = decoders.Sequence(steps)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
  )
  model.train_from_iterator(lines, trainer)
  if way == "normalizer":  # Llama 2: one word, which the normalizer marks
    values = json.loads(model.to_str()) | {"pre_tokenizer": None}
    values["added_tokens"] = values["added_tokens"][:1]
    model = tokenizers.Tokenizer.from_str(json.dumps(values))
    prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    model.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
  if way == "added":
    model.add_tokens([tokenizers.AddedToken("<tool>", lstrip=True), "é"])
    model.add_special_tokens(["<|im_start|>"])
  return BPETokenizer(model)


TEXTS = st.lists(
  st.sampled_from(
    ["def ", "<tool>", "line", " ", "  ", "\n", "\r\n", "\t", "12345", "。", "你好", "é", "</s>"]
  )
  | st.text(st.characters(codec="utf-8"), max_size=5),
  max_size=40,
).map("".join)


@pytest.mark.parametrize("way", WAYS)
@given(text=TEXTS, size=st.integers(5, 30))
@example(text=":\n<tool>", size=5)
def test_pieces_have_the_ids_of_the_whole_text_which_decode_to_it(way, text, size):
  """Wherever the tokenizer itself gives the text back, and as its library cuts the whole of it."""
  tokenizer = other_model(way)
  excerpts, before = list[Excerpt](), ""
  for raw, _ in cut_pieces([text.encode()], size, 1 << 20):
    excerpts.append(Excerpt(raw.decode(), before))
    before = raw.decode()[-1:]
  ids = np.concatenate(list(tokenizer.encode_all(excerpts))).tolist()
  expected = tokenizer.model.encode(text, add_special_tokens=False).ids
  assert ids == expected
  library = tokenizer.model.decode(expected, skip_special_tokens=False)
  assert tokenizer.decode(ids) == library
  if way in ("cl100k", "normalizer") and not text.startswith(" "):
    assert library == text


@pytest.mark.parametrize("way", ["normalizer", "always", "cl100k"])
def test_text_without_any_border_is_cut_without_a_space(way):
  """Over the length at which a cut has to be: no text is lost, and none is put in."""
  tokenizer = other_model(way)
  text = "abcdefghij" * 40
  pieces = [text[start : start + 33] for start in range(0, len(text), 33)]
  befores = ["", *(piece[-1] for piece in pieces)]
  ids = list(tokenizer.encode_all(map(Excerpt, pieces, befores)))
  assert tokenizer.decode(np.concatenate(ids)) == text


@pytest.mark.parametrize("piece", [300, 1000])
def test_ids_of_pieces_are_those_of_the_whole_text(bpe, tmp_path, monkeypatch, piece):
  """As the library gives them for each document at once, also where it puts a space before it."""
  monkeypatch.setattr(formats, "PIECE", piece)
  lines = "".join(f"  line {i}, with\n\n\tan indented one; \n()\n" for i in range(90))
  texts = [lines, lines.replace("\n", "\r\n"), "é€😀 und mehr\n" * 90, "short"]
  for name, text in zip(("0", "1", "2", "val"), texts):  # so that none is cut
    (tmp_path / f"{name}.txt").write_text(text, newline="")
  config = DataConfig(source=str(tmp_path))
  for tokenizer in (bpe, *map(other_model, WAYS)):
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
