"""Text to token ids and back: bytes, or a byte-pair encoding through the `tokenizers` library."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from jaxlm.config import DataConfig
from jaxlm.data.formats import Document
from pallas_kernels.common.errors import UserError

FILE = "tokenizer.json"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>")
PIECE = 1 << 15  # characters that are encoded as one text
BATCH = 128  # pieces that the library encodes in parallel; it needs some 100 bytes per token while it does


class Tokenizer(Protocol):
  """Ids are 1-D arrays of the smallest unsigned dtype that holds the vocabulary."""

  @property
  def vocab_size(self) -> int: ...

  @property
  def eos(self) -> int:
    """Stands between documents; `encode` never gives it."""

  def encode(self, text: str) -> np.ndarray: ...

  def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of each text, with memory that grows with the longest text, not with their number."""

  def decode(self, ids: np.ndarray | Sequence[int]) -> str: ...

  def save(self, folder: Path) -> None:
    """Writes what `load_tokenizer(folder, config)` needs."""


class ByteTokenizer:
  """A token is a byte of UTF-8; the end of a text is NUL, which text files do not contain."""

  vocab_size = 256
  eos = 0

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)

  def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
    return map(self.encode, texts)

  def decode(self, ids: np.ndarray | Sequence[int]) -> str:
    """Text of the bytes; U+FFFD where they are not UTF-8, as in the middle of a character."""
    return bytes(map(int, ids)).decode(errors="replace")

  def save(self, folder: Path) -> None:
    """Nothing to write: the configuration says `bytes`."""


class BPETokenizer:
  """A tokenizer.json of the `tokenizers` library.

  Text that spells a special token is encoded as ordinary text, and a truncation or padding that the file asks for is
  switched off. Texts over 32,768 characters are encoded in pieces cut at line breaks.
  """

  def __init__(self, model: tokenizers.Tokenizer, name: str = "tokenizer") -> None:
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    ends = [id for id in map(model.token_to_id, END_OF_TEXT) if id is not None]
    if not ends:
      raise UserError(f"{name}: no end-of-text token, it must have one of {' '.join(END_OF_TEXT)}")
    self.model = model
    self.eos = ends[0]
    self.vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values())
    self.dtype = np.min_scalar_type(self.vocab_size - 1)

  @classmethod
  def load(cls, path: Path) -> BPETokenizer:
    """Reads a tokenizer.json; ValueError names the file where it is missing, damaged, or has no end-of-text token."""
    if not path.is_file():
      raise UserError(f"data.tokenizer={str(path)!r}: no such file (or bytes, or bpe:SIZE)")
    try:
      model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
      raise UserError(f"data.tokenizer={str(path)!r}: not a tokenizer.json: {error}") from error
    return cls(model, f"data.tokenizer={str(path)!r}")

  def encode(self, text: str) -> np.ndarray:
    return next(self.encode_all([text]))

  def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
    stream = ((piece, last) for text in texts for piece, last in pieces(text))
    parts = list[np.ndarray]()
    while batch := list(itertools.islice(stream, BATCH)):
      encoded = self.model.encode_batch_fast(
        [piece for piece, _ in batch], add_special_tokens=False
      )
      for encoding, (_, last) in zip(encoded, batch):
        parts.append(np.array(encoding.ids, self.dtype))
        if last:
          yield np.concatenate(parts)
          parts = []

  def decode(self, ids: np.ndarray | Sequence[int]) -> str:
    return self.model.decode([int(id) for id in ids], skip_special_tokens=False)

  def save(self, folder: Path) -> None:
    self.model.save(str(Path(folder) / FILE))


def pieces(text: str, size: int = PIECE) -> Iterator[tuple[str, bool]]:
  """At least one part of at most `size` characters, cut at line breaks where there are any; True with the last."""
  start = 0
  while len(text) - start > size:
    stop = text.rfind("\n", start, start + size) + 1 or start + size
    yield text[start:stop], False
    start = stop
  yield text[start:], True


def train_bpe(texts: Iterable[str], size: int) -> BPETokenizer:
  """Byte-level BPE of exactly `size` tokens; the same texts give the same tokens. Id 0 is <|endoftext|>.

  Raises ValueError where the texts have too few different words for `size` tokens.
  """
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[END_OF_TEXT[0]],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator((piece for text in texts for piece, _ in pieces(text)), trainer)
  if (found := model.get_vocab_size()) < size:
    raise UserError(
      f"data.tokenizer='bpe:{size}': the training text yields only {found} tokens, bpe:{found} at most"
    )
  return BPETokenizer(model)


def make_tokenizer(config: DataConfig, documents: Iterable[Document]) -> Tokenizer:
  """The tokenizer that `config.tokenizer` asks for; `bpe:SIZE` is trained on the documents."""
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  if config.tokenizer.startswith("bpe:"):
    return train_bpe(
      (document.text for document in documents), int(config.tokenizer.removeprefix("bpe:"))
    )
  return BPETokenizer.load(Path(config.tokenizer).expanduser())


def load_tokenizer(folder: Path, config: DataConfig, vocabulary: int | None = None) -> Tokenizer:
  """The tokenizer that a run wrote into its folder by `save`; ValueError where its ids go beyond the `vocabulary`."""
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  tokenizer = BPETokenizer.load(Path(folder) / FILE)
  if vocabulary is not None:
    check_vocabulary(tokenizer, vocabulary, Path(folder) / FILE)
  return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocabulary: int, path: Path) -> None:
  """ValueError where a tokenizer gives ids that a model does not have: an embedding is not checked for them."""
  if tokenizer.vocab_size > vocabulary:
    raise UserError(
      f"{path}: has {tokenizer.vocab_size} ids, more than model.V={vocabulary}; it is another tokenizer"
    )
