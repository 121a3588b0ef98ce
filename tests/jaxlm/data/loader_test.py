import dataclasses
import json
import math
import shutil

import chex
import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.data import arrays
from jaxlm.data import store as module
from jaxlm.data.arrays import read_blocks
from jaxlm.data.baselines import baselines
from jaxlm.data.corpus import open_source
from jaxlm.data.formats import Reader
from jaxlm.data.loader import heldout_batches, load_text, train_loader
from jaxlm.data.split import Split, assign_sides
from jaxlm.data.tokenize import tokenize
from jaxlm.data.tokenizer import ByteTokenizer
from pallas_kernels.common.errors import UserError

LENGTH, BATCH = 16, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """20 documents of 1 to 191 different words."""
  folder = tmp_path_factory.mktemp("text")
  for i in range(20):
    (folder / f"{i}.txt").write_text(" ".join(f"{i}.{word}" for word in range(1 + 10 * i)) + "é")
  return folder


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
  """The same text on disk, in shards of many chunks."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(arrays, "CHUNK", 64)
    patch.setattr(module, "SHARD", 1024)
    at = tmp_path_factory.mktemp("stores") / "store"
    tokenize(DataConfig(source=str(folder), holdout=0.2), at)
    assert (at / "train/tokens/c/3").exists()
    return at


@pytest.fixture(scope="module", params=["windows", "packed", "windows of a store", "packed store"])
def text(request, folder, store):
  config = DataConfig(source=str(folder), length=LENGTH, holdout=0.2)
  if "store" in request.param:
    config = DataConfig(source=str(store), length=LENGTH)
  return load_text(dataclasses.replace(config, layout=request.param.split()[0]))


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_same(got, expected):
  for a, b in zip(got, expected, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def rows_of(batches):
  return [
    row.tobytes()
    for batch in batches
    for row in np.concatenate([batch.inputs_BT, batch.targets_BT], axis=1)
  ]


def test_shapes_and_types(text):
  batch = next(train_loader(text, batch=BATCH, seed=0))
  kinds = ["int32", "int32", "float32", *(["int32"] * 2 if text.config.layout == "packed" else [])]
  assert [array.dtype for array in batch if array is not None] == kinds
  chex.assert_shape([array for array in batch if array is not None], (BATCH, LENGTH))


@pytest.mark.parametrize("parts", [2, 4])
def test_slices_reassemble_to_the_whole(text, parts):
  whole = take(train_loader(text, batch=BATCH, seed=3), 5)
  size = BATCH // parts
  slices = [
    take(train_loader(text, batch=BATCH, seed=3, rows=slice(i, i + size)), 5)
    for i in range(0, BATCH, size)
  ]
  for step, batch in enumerate(whole):
    for field, array in enumerate(batch):
      if array is not None:
        np.testing.assert_array_equal(np.concatenate([part[step][field] for part in slices]), array)


def test_only_the_slice_is_built(text):
  seen, original = [], type(text.train).build

  class Spy:
    __len__ = text.train.__len__

    def build(self, index_B):
      seen.append(len(index_B))
      return original(text.train, index_B)

  take(
    train_loader(dataclasses.replace(text, train=Spy()), batch=BATCH, seed=0, rows=slice(2, 4)), 3
  )
  assert set(seen) == {2}


def test_epochs_hold_every_row_once_in_another_order(text):
  count = len(text.train)
  rows = rows_of(take(train_loader(text, batch=BATCH, seed=0), -(-2 * count // BATCH)))
  everything = rows_of([text.train.build(np.arange(count))])
  first, second = rows[:count], rows[count : 2 * count]
  assert sorted(first) == sorted(second) == sorted(everything)
  assert first != second and first != everything


def test_seeds_differ_and_repeat(text):
  first = [
    rows_of(take(train_loader(text, batch=BATCH, seed=seed), 3)) for seed in (0, 0, 1, 2**40)
  ]
  assert first[0] == first[1] and first[0] != first[2] != first[3] != first[0]
  # The next seed is not this one an epoch later.
  count = len(text.train)
  later = rows_of(take(train_loader(text, batch=BATCH, seed=0), -(-2 * count // BATCH)))[
    count : 2 * count
  ]
  assert later[: 3 * BATCH] != first[2]


def test_state_continues_exactly(text):
  iterator = train_loader(text, batch=BATCH, seed=0)
  take(iterator, 7)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 20)
  again = train_loader(text, batch=BATCH, seed=0)
  again.set_state(state)
  assert_same(take(again, 20), expected)
  iterator.set_state(state)  # an iterator that has prefetched something else
  assert_same(take(iterator, 20), expected)


@pytest.mark.parametrize("batch", [1, BATCH // 2, BATCH + 3])
def test_another_batch_goes_on_with_the_next_row(text, batch):
  """Rows come in the order of an unchanged batch, none twice and none left out."""
  expected = rows_of(take(train_loader(text, batch=BATCH, seed=0), 6))
  iterator = train_loader(text, batch=BATCH, seed=0)
  before = rows_of(take(iterator, 3))
  again = train_loader(text, batch=batch, seed=0)
  again.set_state(iterator.get_state())
  after = rows_of(take(again, -(-3 * BATCH // batch)))
  assert [*before, *after][: len(expected)] == expected


def test_a_position_in_batches_is_refused(text):
  with pytest.raises(UserError, match="its position counts batches"):
    train_loader(text, batch=BATCH, seed=0).set_state({"next_index": 3})


def stream(side):
  return np.concatenate(list(read_blocks(side.tokens)))


def test_heldout_scores_every_token_once_and_pads_the_last_batch(text):
  batches = list(heldout_batches(text, batch=BATCH))
  chex.assert_shape([batch.inputs_BT for batch in batches], (BATCH, LENGTH))
  targets = np.concatenate([batch.targets_BT[batch.weights_BT == 1] for batch in batches])
  assert sorted(targets) == sorted(stream(text.store.heldout)[1:])
  assert text.heldout_tokens_per_byte == pytest.approx(len(targets) / text.store.heldout.size)
  assert_same(heldout_batches(text, batch=BATCH, limit=10**6), batches)


def test_a_limited_heldout_reads_rows_from_all_over_the_text(text):
  (batch,) = heldout_batches(text, batch=BATCH, limit=1)
  every = np.concatenate([batch.inputs_BT for batch in heldout_batches(text, batch=BATCH)])
  places = [(every == row).all(axis=1).nonzero()[0][0] for row in batch.inputs_BT]
  assert places == sorted(places)
  assert np.diff([*places, len(text.heldout)]).max() <= -(-len(text.heldout) // BATCH)


def test_heldout_slices_reassemble(text):
  whole = list(heldout_batches(text, batch=BATCH))
  halves = [
    list(heldout_batches(text, batch=BATCH, rows=rows)) for rows in (slice(0, 4), slice(4, 8))
  ]
  for batch, left, right in zip(whole, *halves, strict=True):
    assert_same([[np.concatenate(pair) for pair in zip(left[:3], right[:3])]], [batch[:3]])


def test_bits_per_byte_of_a_known_model(text):
  """A model of byte frequencies costs what the baseline says, but for the ends of documents."""
  nats = np.bincount(stream(text.store.train), minlength=256).astype(float)
  nats[0] = 0  # the baseline knows no ends of documents
  nats = -np.log((nats + 1) / (nats + 1).sum())
  batches = list(heldout_batches(text, batch=BATCH))
  total = sum((batch.weights_BT * nats[batch.targets_BT]).sum() for batch in batches)
  tokens = sum(batch.weights_BT.sum() for batch in batches)
  heldout = text.store.heldout
  ends = heldout.documents * nats[0] / math.log(2) / heldout.size
  expected = baselines(text.store)["byte frequencies"] + ends
  assert text.bits_per_byte(total / tokens) == pytest.approx(expected)


def test_a_store_gives_the_batches_of_the_text_in_it(folder, store):
  for layout in ("windows", "packed"):
    texts = [
      load_text(DataConfig(source=str(source), length=LENGTH, layout=layout, holdout=0.2))
      for source in (folder, store)
    ]
    assert texts[0].digests == texts[1].digests
    batches = [take(train_loader(text, batch=BATCH, seed=5), 9) for text in texts]
    for field in range(5 if layout == "packed" else 3):
      for a, b in zip(*batches, strict=True):
        np.testing.assert_array_equal(a[field], b[field])


def test_damage_is_an_error_of_the_iterator(store, tmp_path):
  at = shutil.copytree(store, tmp_path / "store")
  content = bytearray((at / "train/tokens/c/1").read_bytes())
  content[9] ^= 1
  (at / "train/tokens/c/1").write_bytes(content)
  iterator = train_loader(load_text(DataConfig(source=str(at), length=LENGTH)), batch=64, seed=0)
  with pytest.raises(UserError, match="damaged token store: .*train/tokens/c/1"):
    take(iterator, 20)


def test_layouts_score_the_same_heldout_tokens(folder):
  both = [
    load_text(DataConfig(source=str(folder), length=LENGTH, layout=layout))
    for layout in ("windows", "packed")
  ]
  assert both[0].heldout_tokens_per_byte == both[1].heldout_tokens_per_byte


def test_bpe_and_a_given_tokenizer(folder):
  config = DataConfig(source=str(folder), length=LENGTH, tokenizer="bpe:300")
  text = load_text(config)
  batch = text.train.build(np.arange(len(text.train)))
  joined = text.tokenizer.decode(
    np.concatenate([batch.inputs_BT[0, :1], batch.targets_BT.reshape(-1)])
  )
  split = Split.parse(**text.store.meta["split"])
  pieces = assign_sides(split, open_source(config).pieces(Reader(config)))
  documents = [piece.text for side, piece in pieces if side == "train"]
  eos = "<|endoftext|>"
  assert eos.join(["", *documents, ""]).startswith(joined)
  assert len(joined) > 1000
  assert text.heldout_tokens_per_byte < 0.8
  given = load_text(config, ByteTokenizer())
  assert given.tokenizer.vocab_size == 256 and given.heldout_tokens_per_byte > 1
  assert "300 different tokens" in text.report and "20 documents" in text.report


def test_text_shorter_than_a_row(tmp_path):
  (tmp_path / "a.txt").write_text("0123456789\n")
  with pytest.raises(
    ValueError, match="data.length=256: the training text has 12 tokens, a row needs 257"
  ):
    load_text(DataConfig(source=str(tmp_path)))
  for options in ({"length": 10}, {"layout": "packed"}):
    text = load_text(DataConfig(source=str(tmp_path), **options))
    batch = next(train_loader(text, batch=2, seed=0))
    assert len(text.train) == 1 and (batch.targets_BT[0] == batch.targets_BT[1]).all()
