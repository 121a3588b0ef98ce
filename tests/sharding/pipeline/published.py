"""Bubble rates printed by Qi et al. 2024 (arXiv 2401.10241, Tables 5 and 9), and their settings.

Columns: ranks, micro-batches, times of F, B, W and of a hop (ms), bubble rates of 1F1B, interleaved
1F1B with its number of chunks, ZB-H1, ZB-H2, and of their heuristic under the memory of 1F1B
(ZB-1p) and twice that (ZB-2p), then heads and width of the model.
"""

from typing import NamedTuple

from sharding.pipeline import Footprint, Times


class Row(NamedTuple):
  P: int
  M: int
  times: Times
  one_f_one_b: float
  interleaved: float
  chunks: int
  zb_h1: float
  zb_h2: float
  zb_1p: float
  zb_2p: float
  footprint: Footprint


_TEXT = """
 8  24 18.522 18.086  9.337 .601 .2431 .1055 3 .1585 .1083 .1585 .0433 24 2304
 8  32 18.513 18.086  9.331 .626 .1985 .0818 3 .1242 .0837 .1242 .0039 24 2304
 8  64 18.546 18.097  9.321 .762 .1240 .0443 3 .0674 .0444 .0674 .0026 24 2304
 8  24 29.718 29.444 19.927 .527 .2347 .0808 4 .1323 .0698 .1323 .0029 32 4096
 8  32 29.802 29.428 19.530 .577 .1898 .0628 4 .1045 .0559 .1045 .0022 32 4096
 8  64 29.935 29.621 19.388 .535 .1091 .0320 4 .0554 .0294 .0554 .0010 32 4096
16  48 11.347 11.248  8.132 .377 .2552 .1104 3 .1397 .0672 .1397 .0066 40 5120
16  64 11.307 11.254  8.101 .379 .2082 .0852 3 .1088 .0516 .1088 .0054 40 5120
16 128 11.325 11.308  8.109 .378 .1251 .0445 3 .0576 .0266 .0576 .0028 40 5120
32  96 10.419 10.207  7.715 .408 .2646 .1493 2 .1421 .0641 .1421 .0038 48 6144
32 128 10.408 10.204  7.703 .408 .2168 .1164 2 .1106 .0490 .1106 .0029 48 6144
32 256 10.402 10.248  7.698 .460 .1352 .0624 2 .0594 .0257 .0594 .0018 48 6144
"""


def _parse(line: str) -> Row:
  P, M, f, b, w, hop, *rates, heads, width = line.split()
  plain, interleaved, chunks, h1, h2, one, two = rates
  times = Times(forward=float(f), input_gradient=float(b), weight_gradient=float(w), hop=float(hop))
  # M_W / M_B = 32 / (34 + 5 a s / h) at sequences of 1024 (Table 1)
  ratio = 32 / (34 + 5 * int(heads) * 1024 / int(width))
  return Row(
    P=int(P),
    M=int(M),
    times=times,
    one_f_one_b=float(plain),
    interleaved=float(interleaved),
    chunks=int(chunks),
    zb_h1=float(h1),
    zb_h2=float(h2),
    zb_1p=float(one),
    zb_2p=float(two),
    footprint=Footprint(until_weight_gradient=ratio),
  )


ROWS = tuple(_parse(line) for line in _TEXT.strip().splitlines())
