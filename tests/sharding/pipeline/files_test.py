"""Schedule files: what is written is read back, and what is not a schedule is refused."""

import pytest

from pallas_kernels.common.errors import UserError
from sharding.pipeline import schedules
from sharding.pipeline.files import from_csv, to_csv
from tests.sharding.pipeline.schedules_test import CASES


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
  schedule = CASES[name](4, 8)
  assert from_csv(to_csv(schedule), name) == schedule


def test_cells_are_those_of_torch():
  assert to_csv(schedules.zb_h1(2, 2)) == ("0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1F1,1I1,1W0,1W1\n")
  text = to_csv(schedules.dualpipe(2, 4))
  assert "OVERLAP_F_B" in text and text.startswith("0F0,1F2,")
  assert from_csv("0F0,,0B0\n1F0,1B0,\n").actions == schedules.one_f_one_b(2, 1).actions


@pytest.mark.parametrize(
  "text,message",
  [
    ("0F0,0X0\n", "csv: row 1, cell 2: '0X0': a cell is like 3F5"),
    ("(0F0;0B0)\n", r"csv: row 1, cell 1: '\(0F0;0B0\)'"),
    ("", "csv: holds no forward pass"),
    ("0F0\n1F1\n", "csv: holds no forward pass of stage 0, micro-batch 1"),
    ("0F0,0F1,0F3\n0F2\n", "csv: rank 1 runs stage 0 of micro-batch 2, others another one"),
  ],
)
def test_other_text_is_refused(text, message):
  with pytest.raises(UserError, match=message):
    from_csv(text)
