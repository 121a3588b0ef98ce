import math
import random
import zlib

import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.data.baselines import baselines, unigram_bits_per_byte
from jaxlm.data.cache import open_text


def counts(text):
  return np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)


def test_unigram_by_hand():
  bits = [math.log2(260 / 4), math.log2(260 / 2), math.log2(260), math.log2(260)]
  # counts plus one: a 4, b 2, 254 others 1
  assert unigram_bits_per_byte(counts("aaab"), counts("abé")) == pytest.approx(sum(bits) / 4)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270"])
def test_baselines_of_a_text_are_those_of_its_held_out_documents_at_once(tmp_path, tokenizer):
  text = "".join(random.Random(0).choices("abcd é", k=2000))
  for name in ("train0", "train1", "val0", "val1"):
    (tmp_path / f"{name}.txt").write_text(text)
  store = open_text(DataConfig(source=str(tmp_path), tokenizer=tokenizer))
  heldout = text * store.heldout.documents
  found = baselines(store)
  assert found["zlib"] == 8 * len(zlib.compress(heldout.encode(), 9)) / len(heldout.encode())
  assert found["byte frequencies"] == unigram_bits_per_byte(
    counts(text) * store.train.documents, counts(heldout)
  )
  assert store.heldout.documents == 2
