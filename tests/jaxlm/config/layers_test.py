"""Layers as data: stacks, models from plain fields, and lists of layers arranged as a pattern."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config import LayerSpec, MlpConfig, ModelConfig, decoder, rearrange, revise

A, B, C = (LayerSpec(feedforward=MlpConfig(F=F)) for F in (8, 16, 24))


def test_stacks_are_prefix_pattern_and_remainder_with_equal_neighbours_joined():
  """61 layers whose first 3 differ are two stacks: one scan each."""
  assert ModelConfig(layers=61, prefix=(A,) * 3, pattern=(B,)).stacks == (((A,), 3), ((B,), 58))
  model = ModelConfig(layers=9, prefix=(A, B, B), pattern=(A, B), remainder=(C, C))
  assert model.stacks == (((A,), 1), ((B,), 2), ((A, B), 2), ((C,), 2))
  assert model.layer_specs == (A, B, B, A, B, A, B, C, C)
  assert ModelConfig(layers=2, prefix=(A, B), pattern=(C,)).stacks == (((A,), 1), ((B,), 1))


def test_plain_fields_go_to_the_part_that_has_them():
  model = decoder(D=16, F=24, N=4, K=2, H=6, layers=6, windows=(5, None), bias=True, cap=2.0)
  window, full = model.pattern
  assert (model.D, model.layers, window.feedforward) == (16, 6, MlpConfig(F=24, bias=True))
  assert (window.mixer.window, full.mixer.window) == (5, None)
  assert {(s.mixer.N, s.mixer.K, s.mixer.H, s.mixer.cap) for s in model.pattern} == {(4, 2, 6, 2.0)}
  uneven = ModelConfig(layers=4, prefix=(A,), remainder=(B,))
  wide = revise(uneven, F=40, D=64)
  assert {spec.feedforward.F for spec in wide.layer_specs} == {40} and wide.D == 64
  assert len(wide.layer_specs) == 4


def test_a_field_that_no_part_has_is_an_error():
  with pytest.raises(TypeError, match="heads"):
    revise(ModelConfig(), heads=3)


def fewest_blocks(specs) -> int:
  """Returns how few blocks any prefix, pattern and remainder compile as, by trying all."""

  def runs(part) -> int:
    return len(list(itertools.groupby(part)))

  best = len(specs)
  for start, length in itertools.product(range(len(specs)), range(1, len(specs) + 1)):
    stop = start + length
    while stop <= len(specs):
      if specs[start:stop] == specs[start : start + length] * ((stop - start) // length):
        best = min(best, runs(specs[:start]) + length + runs(specs[stop:]))
      stop += length
  return best


@given(st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=10).map(tuple))
def test_a_list_of_layers_is_arranged_as_the_fewest_blocks(specs):
  model = rearrange(ModelConfig(layers=len(specs), pattern=specs))
  assert model.layer_specs == specs
  assert sum(len(block) for block, _ in model.stacks) == fewest_blocks(specs)


def test_arrangements_of_known_models():
  """Three dense layers and 58 of experts; 26 in turn; 27 as three of one kind, one of another."""

  def shapes(*specs):
    model = rearrange(ModelConfig(layers=len(specs), pattern=specs))
    return [(len(block), repeats) for block, repeats in model.stacks]

  assert shapes(*[A] * 3, *[B] * 58) == [(1, 3), (1, 58)]
  assert shapes(*[A, B] * 13) == [(2, 13)]
  assert shapes(*[A, A, A, B] * 6, A, A, A) == [(4, 6), (1, 3)]
