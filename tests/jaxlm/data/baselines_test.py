import math
import random
import zlib

import pytest

from jaxlm.data.baselines import unigram_bits_per_byte, zlib_bits_per_byte
from jaxlm.data.corpus import Document


def test_unigram_by_hand():
  train = [Document("1", "aa"), Document("2", "ab")]  # counts plus one: a 4, b 2, 254 others 1
  heldout = [Document("3", "ab"), Document("4", "é")]
  bits = [math.log2(260 / 4), math.log2(260 / 2), math.log2(260), math.log2(260)]
  assert unigram_bits_per_byte(train, heldout) == pytest.approx(sum(bits) / 4)


def test_zlib_compresses_all_text_at_once():
  text = "".join(random.Random(0).choices("abcd", k=2000))
  one, two = (
    zlib_bits_per_byte([Document("1", text)]),
    zlib_bits_per_byte([Document("1", text), Document("2", text)]),
  )
  assert one == 8 * len(zlib.compress(text.encode(), 9)) / 2000
  assert 2 < one and two < 0.6 * one
