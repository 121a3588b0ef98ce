"""Small quantised models: which rules a method has at a precision, and how runs get them."""

import pytest

from experiments import small_quantized, small_text
from jaxlm.config.formats import LsqFormat, QuestFormat, UniformFormat
from jaxlm.recipes import load_rules
from jaxlm.scaling.grid import with_fields
from pallas_kernels.common.errors import UserError


def model(D=32):
  return with_fields(small_text.base("smoke"), small_quantized.shape(D, 1)).model


@pytest.mark.parametrize(
  "method, precision, weight, activation",
  [
    ("QuEST", "W4A4", QuestFormat(levels="int4", hadamard=32), "as weight"),
    ("QuEST", "FP4", QuestFormat(levels="fp4", hadamard=32), "as weight"),
    ("QuEST, no Hadamard", "W1A16", QuestFormat(levels="int1", hadamard=0), None),
    ("LSQ", "W2A4", LsqFormat(bits=2, grid="midrise", start="gaussian"), "of 4 bits"),
    ("STE", "W1A1", UniformFormat(bits=1, grid="midrise"), "as weight"),
  ],
)
def test_a_method_at_a_precision_is_one_rule(method, precision, weight, activation):
  (rule,) = small_quantized.rules_of(model(), method, precision)
  assert rule.match == "layers.*" and rule.spec.weight == weight
  expected = {"as weight": weight, "of 4 bits": LsqFormat(bits=4, grid="midrise", start="gaussian")}
  assert rule.spec.activation == expected.get(activation)


def test_what_does_not_exist_is_refused():
  assert small_quantized.rules_of(model(), "STE", "16") == ()
  with pytest.raises(UserError, match="LSQ has equally spaced levels alone"):
    small_quantized.rules_of(model(), "LSQ", "FP4")
  with pytest.raises(UserError, match="method='quest'"):
    small_quantized.rules_of(model(), "quest", "W4A4")


def test_a_run_has_the_rules_of_its_method_or_recipe(monkeypatch):
  monkeypatch.setattr(small_quantized, "_make_text_task", lambda config: (config, None))
  config = small_text.base("smoke")
  plain, _ = small_quantized.make_task(config)
  trained, _ = small_quantized.make_task(config, recipe="paretoq:2")
  assert plain == config and trained.model.quant == load_rules("paretoq:2")
  with pytest.raises(UserError, match="the method is LSQ already"):
    small_quantized.make_task(config, "LSQ", "W4A4", recipe="int4")
