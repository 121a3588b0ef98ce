"""The split is by bytes, near the asked fraction whatever the sizes of documents."""

import json
import random

import pytest

from jaxlm.config import DataConfig
from jaxlm.data import formats, split
from jaxlm.data.arrays import read_blocks
from jaxlm.data.cache import open_text
from jaxlm.data.pieces import Piece
from jaxlm.data.split import Cut, Split, Survey, assign_sides, better_split, make_split


def sides(source, **options):
  """The documents of both sides, and the store."""
  store = open_text(DataConfig(source=str(source), **options))
  documents = [
    b"".join(block.tobytes() for block in read_blocks(side.tokens)).decode().split("\0")[1:-1]
    for side in (store.train, store.heldout)
  ]
  return *documents, store


def write(folder, sizes):
  """Writes a document of lines of 10 bytes for each size, and returns all text."""
  texts = ["".join(f"{n:02} {i:05} \n" for i in range(size // 10)) for n, size in enumerate(sizes)]
  for index, text in enumerate(texts):
    (folder / f"{index}.txt").write_text(text)
  return texts


SIZES = {
  "one": [3000],
  "a large and a small one": [60_000, 1300],
  "a small and a large one": [1300, 60_000],
  "three": [5000] * 3,
  "seven": [4000] * 7,
  "twelve": [3000] * 12,
  "forty": [1000] * 40,
  "one among small ones": [40_000, *[100] * 60],
  "many": [100] * 400,
  "all different": [int(1.3**n) * 10 for n in range(30)],
}


@pytest.mark.parametrize("holdout", [0.01, 0.03, 0.2, 0.5])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", ["files", "records"])
def test_what_is_held_out_is_near_the_fraction_of_the_bytes(tmp_path, name, holdout, kind):
  texts = write(tmp_path, SIZES[name])
  if kind == "records":
    for path in tmp_path.iterdir():
      path.unlink()
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
  train, heldout, store = sides(tmp_path, holdout=holdout)
  total = len("".join(texts))
  assert abs(store.heldout.size - holdout * total) <= split.TOLERANCE * holdout * total
  whole = [text for text in texts if text in train or text in heldout]
  parts = [(a, b) for a in train for b in heldout if a + b in texts and a + b not in whole]
  assert len(whole) + len(parts) == len(texts)
  assert all(a[-1] in " \n" for a, _ in parts)
  report = "of these the end is held out" in store.report
  assert report == (len(parts) > 0) and len(parts) <= 8


def test_documents_keep_their_side_when_others_go(tmp_path):
  rng = random.Random(0)
  write(tmp_path, [rng.randrange(100, 1000) for _ in range(300)])
  before = sides(tmp_path, holdout=0.3)
  for i in range(0, 300, 2):
    (tmp_path / f"{i}.txt").unlink()
  after = sides(tmp_path, holdout=0.3)
  moved = (set(after[0]) - set(before[0])) | (set(after[1]) - set(before[1]))
  assert len(moved) <= 8 and len(after[1]) > 30


def test_a_single_document_is_split_at_a_line_break(tmp_path):
  text = "".join(f"line {i}\n" for i in range(1000))
  (tmp_path / "one.txt").write_text(text)
  (train,), (heldout,), _ = sides(tmp_path / "one.txt", holdout=0.1)
  assert train + heldout == text and train.endswith("\n")
  assert 0.099 < len(heldout) / len(text) < 0.101


@pytest.mark.parametrize(
  ("text", "border"),
  [
    ("one two. three\nfour " * 99, "\n"),
    ("One. Two, three? " * 99, ". "),
    ("一二三。四五六七、" * 99, "。"),
    ("alpha beta " * 99, " "),
    (("word " * 100 + "\n") * 8, " "),  # the nearest line ends 2.5 % of the text away
    ("é" * 999, "é"),
  ],
)
def test_a_cut_goes_to_the_best_border_near_it(tmp_path, text, border):
  (tmp_path / "one.txt").write_text(text)
  (train,), (heldout,), _ = sides(tmp_path, holdout=0.1)
  assert train + heldout == text
  assert train.endswith(border if border != ". " else (". ", "? "))
  assert 0.09 <= len(heldout.encode()) / len(text.encode()) <= 0.11


@pytest.mark.parametrize("text", ["ab", "\n" + "a" * 99, "a" * 99 + "\n", "\n" * 100])
@pytest.mark.parametrize("holdout", [0.01, 0.25, 0.5])
def test_without_a_near_line_break_the_cut_is_at_the_fraction(tmp_path, text, holdout):
  (tmp_path / "one.txt").write_text(text)
  (train,), (heldout,), _ = sides(tmp_path, holdout=holdout)
  assert train + heldout == text and train and heldout
  assert abs(len(heldout) - holdout * len(text)) <= 1


@pytest.mark.parametrize("texts", ["ab", ["€", "é"], ["a", "b" * 90], ["😀"] * 9])
@pytest.mark.parametrize("holdout", [1e-9, 0.5])
def test_neither_side_is_empty(tmp_path, texts, holdout):
  for index, text in enumerate(texts):
    (tmp_path / f"{index}.txt").write_text(text)
  train, heldout, _ = sides(tmp_path, holdout=holdout)
  assert train and heldout and sorted("".join(train + heldout)) == sorted("".join(texts))


def test_the_cut_does_not_depend_on_the_pieces(tmp_path, monkeypatch):
  text = "".join(f"{i} é\n" * (i % 7) + "a" * (i % 90) for i in range(300))
  (tmp_path / "a.txt").write_text(text)
  (tmp_path / "b.txt").write_text("b\n" * 500)
  before = sides(tmp_path, holdout=0.1)[:2]
  for piece in (20, 64, 300, 1000):
    monkeypatch.setattr(formats, "PIECE", piece)
    assert sides(tmp_path, holdout=0.1)[:2] == before


@pytest.mark.parametrize("size", range(1, 12))
def test_every_place_of_a_cut_and_every_piece(size):
  """A cut document comes whole and in order, and each of its sides ends once."""
  text = "ab\ncd\n\nefg\nhéj" * 2
  raw = text.encode()
  borders = [i for i in range(0, len(raw), size) if raw[i] & 0xC0 != 0x80]
  spans = list(zip(borders, [*borders[1:], len(raw)]))
  pieces = [
    Piece("a", raw[a:b].decode(), a, b, b == len(raw), "", None, b == len(raw)) for a, b in spans
  ]
  for place in range(1, len(raw)):
    got = list(assign_sides(Split(0.0, (Cut("a", place, len(raw)),)), iter(pieces)))
    assert "".join(piece.text for _, piece in got) == text
    order = [side for side, _ in got]
    assert order == sorted(order, reverse=True) and set(order) == {"train", "heldout"}
    assert [side for side, piece in got if piece.last] == ["train", "heldout"]
    assert [piece.ends for _, piece in got] == [False] * (len(got) - 1) + [True]


def test_a_survey_of_many_documents_is_bounded_and_near(monkeypatch):
  monkeypatch.setattr(split, "LISTED", 50)
  survey = Survey()
  rng = random.Random(0)
  sizes = {str(n): int(rng.paretovariate(1.2) * 100) for n in range(20_000)}
  for name, size in sizes.items():
    survey.add(name, size)
  assert len(survey.listed) == 50 and survey.size == sum(sizes.values())
  again = Survey(**json.loads(json.dumps(survey.to_json())))
  made = make_split(survey, 0.03)
  assert made == make_split(again, 0.03)
  cuts = {cut.document: cut for cut in made.cuts}
  heldout = sum(
    cuts[name].size - cuts[name].place
    if name in cuts
    else size * (split.place_of(name) < made.border)
    for name, size in sizes.items()
  )
  assert 0.025 < heldout / survey.size < 0.035
  survey.heldout = heldout
  assert better_split(made, 0.03, survey) is None
  survey.heldout = 2 * heldout
  assert better_split(Split(0.5), 0.03, survey) == made
