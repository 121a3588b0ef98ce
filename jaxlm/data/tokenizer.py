"""Turns text into token ids and back: bytes, or byte-pair encoding by the `tokenizers` library."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import tokenizers

from jaxlm.config import DataConfig
from jaxlm.data.placeholder import find_placeholder
from pallas_kernels.common.errors import UserError

FILE = "tokenizer.json"
END_OF_TEXT = (
  *("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>"),
  *("<|eos|>", "<EOS>", "[EOS]", "<|im_end|>", "<|eot_id|>", "<|end|>"),
)
"""Names of the token that ends a text, of which the first that a tokenizer has counts."""
BATCH, BATCH_SIZE = 128, 1 << 22
"""texts, and characters, that the library encodes in parallel, at some 100 bytes per token"""


class Excerpt(NamedTuple):
  """Holds a part of a text, with the character before it there, if there is one."""

  text: str
  before: str = ""


class Tokenizer(Protocol):
  """Encodes text as 1-D arrays of the smallest unsigned dtype that holds the vocabulary."""

  @property
  def vocab_size(self) -> int:
    """Returns the number of ids."""

  @property
  def needed_size(self) -> int:
    """Returns how many ids a model needs at least: those that `encode` gives, and eos."""

  @property
  def eos(self) -> int:
    """Returns the id that stands between documents; `encode` never gives it."""

  @property
  def digest(self) -> str:
    """Identifies the tokenizer: two with the same digest give the same ids."""

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text."""

  def encode_all(self, excerpts: Iterable[Excerpt]) -> Iterator[np.ndarray]:
    """Yields the ids of each excerpt, without what a tokenizer puts before the start of a text.

    Memory grows with the longest excerpt, not with their number.
    """

  def decode(self, ids: np.ndarray | Sequence[int]) -> str:
    """Returns the text of ids."""

  def list_ids(self) -> np.ndarray:
    """Returns the ids that have a text, rising, [ids]: `vocab_size` may count more."""

  def save(self, folder: Path) -> None:
    """Writes what `load_tokenizer(folder, config)` needs."""


class ByteTokenizer:
  """Makes each byte of UTF-8 a token; NUL, which text files do not contain, ends a text."""

  vocab_size = needed_size = 256
  eos = 0
  digest = "bytes"

  def encode(self, text: str) -> np.ndarray:
    """Returns the bytes of the text, uint8."""
    return np.frombuffer(text.encode(), np.uint8)

  def encode_all(self, excerpts: Iterable[Excerpt]) -> Iterator[np.ndarray]:
    """Yields the bytes of each excerpt."""
    return (self.encode(excerpt.text) for excerpt in excerpts)

  def decode(self, ids: np.ndarray | Sequence[int]) -> str:
    """Returns the text of the bytes, with U+FFFD where they are not UTF-8."""
    return bytes(map(int, ids)).decode(errors="replace")

  def list_ids(self) -> np.ndarray:
    """Returns all ids, which are the 256 bytes."""
    return np.arange(self.vocab_size)

  def save(self, folder: Path) -> None:
    """Writes nothing: the configuration says `bytes`."""


class BPETokenizer:
  """Encodes by a tokenizer.json of the `tokenizers` library.

  Text that spells a special token is encoded as ordinary text, and a truncation or padding that the
  file asks for is switched off.
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
    added = model.get_added_tokens_decoder()
    special = {id for id, token in added.items() if token.special} - {self.eos}
    # Published models may have special tokens, for padding say, that they have no weights for.
    self.needed_size = 1 + max(set(self.list_ids().tolist()) - special)
    self.dtype = np.min_scalar_type(self.vocab_size - 1)

  @classmethod
  def load(cls, path: Path) -> BPETokenizer:
    """Reads a tokenizer.json; UserError where it is missing, damaged, or has no end of text."""
    if not path.is_file():
      raise UserError(f"data.tokenizer={str(path)!r}: no such file (or bytes, or bpe:SIZE)")
    content = path.read_bytes()
    if (placeholder := find_placeholder(content)) is not None:
      raise UserError(f"{path}: is {placeholder.description}")
    return cls.parse(content, f"data.tokenizer={str(path)!r}")

  @classmethod
  def parse(cls, content: bytes, name: str) -> BPETokenizer:
    """Reads the content of a tokenizer.json; UserError begins with `name`."""
    try:
      model = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises Exception itself
      raise UserError(f"{name}: not a tokenizer.json: {error}") from error
    return cls(model, name)

  @property
  def digest(self) -> str:
    """Returns a BLAKE2b digest of the tokenizer.json."""
    return hashlib.blake2b(self.model.to_str().encode(), digest_size=16).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text."""
    return next(self.encode_all([Excerpt(text)]))

  def encode_all(self, excerpts: Iterable[Excerpt]) -> Iterator[np.ndarray]:
    """Yields the ids of each excerpt, many of which are encoded in parallel."""
    for batch in _batches(excerpts):
      ids = self._ids([excerpt.before + excerpt.text for excerpt in batch])
      before_ids = self._ids([excerpt.before for excerpt in batch])
      for excerpt, ids_S, before in zip(batch, ids, before_ids):
        if excerpt.before and ids_S[: len(before)] == before:
          ids_S = ids_S[len(before) :]
        elif excerpt.before:  # a token goes on over the border
          ids_S = self._ids_inside(excerpt.text)
        yield np.array(ids_S, self.dtype)

  def _ids_inside(self, text: str) -> list[int]:
    """Returns the ids of a text that goes on within another one, without a space before it."""
    line_break, ids = self._ids(["\n", "\n" + text])
    apart = ids[: len(line_break)] == line_break
    return ids[len(line_break) :] if apart else self._ids([text])[0]

  def _ids(self, texts: list[str]) -> list[list[int]]:
    encodings = self.model.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: np.ndarray | Sequence[int]) -> str:
    """Returns the text of the ids, special tokens spelt out."""
    return self.model.decode([int(id) for id in ids], skip_special_tokens=False)

  def list_ids(self) -> np.ndarray:
    """Returns the ids of the vocabulary and of the added tokens, which may leave gaps."""
    return np.sort(np.fromiter(self.model.get_vocab(with_added_tokens=True).values(), np.int64))

  def start_ids(self) -> tuple[int, ...]:
    """Returns the ids that the file puts before every text, often one or none."""
    text_ids = self.model.encode("a", add_special_tokens=False).ids
    ids = self.model.encode("a").ids
    if not text_ids:  # the vocabulary has no "a"
      return tuple(ids)
    starts = range(len(ids) - len(text_ids) + 1)
    start = next((i for i in starts if ids[i : i + len(text_ids)] == text_ids), 0)
    return tuple(ids[:start])

  def save(self, folder: Path) -> None:
    """Writes tokenizer.json into the folder."""
    self.model.save(str(Path(folder) / FILE))


def _batches(excerpts: Iterable[Excerpt]) -> Iterator[list[Excerpt]]:
  """Yields groups of at most BATCH excerpts, and of little more than BATCH_SIZE characters."""
  batch, size = list[Excerpt](), 0
  for excerpt in excerpts:
    batch.append(excerpt)
    size += len(excerpt.text)
    if len(batch) == BATCH or size >= BATCH_SIZE:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def as_library_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  """Returns a tokenizer of the library with the same ids, which puts eos before every text.

  That is how a run's texts start. NUL, the end of a text of bytes, is <|endoftext|> there.
  """
  if isinstance(tokenizer, BPETokenizer):
    model = tokenizers.Tokenizer.from_str(tokenizer.model.to_str())
  else:
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    del vocabulary[_byte_letters()[tokenizer.eos]]
    model = tokenizers.Tokenizer(
      tokenizers.models.BPE(vocabulary | {END_OF_TEXT[0]: tokenizer.eos}, [])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([END_OF_TEXT[0]])
  end = model.id_to_token(tokenizer.eos)
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{end} $A", pair=f"{end} $A {end} $B", special_tokens=[(end, tokenizer.eos)]
  )
  return model


def _byte_letters() -> list[str]:
  """Returns the letter that stands for each byte in byte-level vocabularies, as in GPT-2's.

  Printable bytes stand for themselves, the others for the letters from U+0100 on.
  """
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = itertools.count(256)
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def train_bpe(texts: Iterable[str], size: int) -> BPETokenizer:
  """Trains a byte-level BPE of exactly `size` tokens, of which id 0 is <|endoftext|>.

  The same texts give the same tokens. Memory grows with the number of different words, not with
  the texts. Raises UserError where the texts have too few different words for `size` tokens.
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
  model.train_from_iterator(texts, trainer)
  if (got := model.get_vocab_size()) < size:
    rule = f"the training text yields only {got} tokens, bpe:{got} at most"
    raise UserError(f"data.tokenizer='bpe:{size}': {rule}")
  return BPETokenizer(model)


def make_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
  """Returns the tokenizer that `config.tokenizer` asks for; `bpe:SIZE` is trained on the texts."""
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  if config.tokenizer.startswith("bpe:"):
    return train_bpe(texts, int(config.tokenizer.removeprefix("bpe:")))
  return BPETokenizer.load(Path(config.tokenizer).expanduser())


def load_tokenizer(folder: Path, config: DataConfig, vocabulary: int | None = None) -> Tokenizer:
  """Returns the tokenizer that a run wrote into its folder by `save`.

  Raises UserError where its ids go beyond the `vocabulary`.
  """
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  tokenizer = BPETokenizer.load(Path(folder) / FILE)
  if vocabulary is not None:
    check_vocabulary(tokenizer, vocabulary, Path(folder) / FILE)
  return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocabulary: int, path: Path) -> None:
  """Raises UserError where a tokenizer gives ids beyond the model's, which no embedding checks."""
  if tokenizer.needed_size > vocabulary:
    rule = (
      f"has {tokenizer.needed_size} ids, more than model.V={vocabulary}; it is another tokenizer"
    )
    raise UserError(f"{path}: {rule}")
