"""The listing reader on a small hand-written kernel, whose cycles are counted by hand."""

import pytest

from pallas_kernels.common.chips import CORES
from pallas_kernels.schedule import DumpError
from pallas_kernels.schedule.listing import KernelSchedule, matmul_kind

# 3 bundles, a loop of 5 trips over 8 bundles (its branch in the 4th has 4 delay slots), 2 bundles.
BUNDLES = """
= control target key end
     0   :  { %s1_s0 = smov 0 }
   0x1   :  { %5 = vsyncpa [#allocation5], 0 /* a comment with {braces */ }
   0x2   :  { %7 = vnop }
   0x3 LB: > { %s2_s1 = sphi %s1_s0, %s3_s2  ;;  %9 = vmatmul.mubr.bf16.gmra.mxu0 %v1 }
   0x4   : > { %s3_s2 = sadd.s32 1, %s2_s1 }
   0x5   : > { %p4_p0 = scmp.ge.s32.totalorder %s3_s2, 5 }
   0x6   : > { %8 = sbr.rel (!%p4_p0) target bundleno = 3 (0x3), region = 10 }
   0x7   : > { %10 = vmatmul.mubr.bf16.gmra.mxu0 %v2 }
   0x8   : > { %11 = vnop }
   0x9   : > { %12 = vnop }
   0xa   : > { %13 = vnop }
   0xb   :  { %14 = vnop }
   0xc   :  { %15 = vnop }
"""
USE = "== CAPACTIY:\nMXU, VALU, VSTORE:SPILL\n 4 4 1\n== UTILIZATION:\n" + "1 2 0\n" * 13
V5E = CORES["v5e"]


def test_loop_cycles_and_matmuls():
  schedule = KernelSchedule(BUNDLES, USE, V5E)
  (loop,) = schedule.loops()
  assert (loop.start, loop.end, loop.trips) == (3, 11, 5)
  total = schedule.total(schedule.root, rare=0)
  assert total.cycles == 3 + 5 * 8 + 2
  assert sum(total.matmuls.values()) == 5 * 2
  assert total.units["VALU"] == 2 * total.cycles
  assert schedule.slots == {"MXU": 4, "VALU": 4, "VSTORE:SPILL": 1}
  # 10 matmuls of 2 units of 8 cycles, on 4 MXUs, in 45 cycles
  assert total.mxu_use(V5E) == pytest.approx(10 * 2 * 8 / 4 / 45)


def test_a_region_without_matmuls_counts_as_often_as_it_runs():
  skipping = BUNDLES.replace(
    "0x1   :  { %5 = vsyncpa", "0x1   :  { %3 = sbr.rel (%p9_p1) target bundleno = 9 (0x9) }"
  )
  schedule = KernelSchedule(
    skipping.replace("bundleno = 3 (0x3)", "bundleno = 8 (0x8)").replace("vmatmul", "vadd"),
    USE,
    V5E,
  )
  # nothing multiplies anywhere: every region counts
  assert schedule.total(schedule.root, rare=0).cycles == 13


def test_dynamic_bound():
  (loop,) = KernelSchedule(BUNDLES.replace("%s3_s2, 5 }", "%s3_s2, %s99 }"), USE, V5E).loops()
  assert loop.trips is None


@pytest.mark.parametrize(
  ("suffixes", "operands", "rows"),
  [
    (".bf16", "bf16", 16),
    (".f32", "f32 as bf16", 8),
    (".s8.s32", "s8", 32),
    (".f8e4m3fn.bf16", "f8 as bf16", 32),
  ],
)
def test_kinds_of_matmul(suffixes, operands, rows):
  kind = matmul_kind(suffixes)
  assert (kind.operands, kind.rows) == (operands, rows)


@pytest.mark.parametrize(
  ("bundles", "use", "message"),
  [
    ("", USE, "no bundles"),
    (BUNDLES, USE[:-6], "13 bundles, but the use of 12"),
    (BUNDLES, "nothing", "cannot be read"),
    (BUNDLES, USE.replace("1 2 0", "1 2"), "3 functional units"),
    (BUNDLES.replace("bundleno = 3 (0x3)", "bundleno = 99"), USE, "branches to 99"),
    (BUNDLES.replace("sbr.rel", "sbr.abs"), USE, "unknown branch"),
  ],
)
def test_what_cannot_be_parsed_raises(bundles, use, message):
  with pytest.raises(DumpError, match=message):
    KernelSchedule(bundles, use, V5E)
