"""Lines are cut the same whatever the blocks, and none is held that is too long."""

import pytest

from jaxlm.data import blocks
from jaxlm.data.blocks import cut_lines, first_fault, text_blocks


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
  "content", [b"", b"\n", b"ab\n\ncdefgh\ni", b"abcdefghij\nk\n", b"abcdefghij"]
)
def test_lines_of_any_blocks(size, content):
  parts = [content[i : i + size] for i in range(0, len(content), size)]
  lines = content.split(b"\n")
  lines = lines[:-1] if not lines[-1] else lines
  for limit in (1, 5, 6, 20):
    expected = [line if len(line) <= limit else None for line in lines]
    assert list(cut_lines(parts, limit)) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_the_place_of_a_fault_does_not_depend_on_the_blocks(size):
  def fault(raw, **options):
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    found = first_fault(parts, "x", **{"allow_invalid": False, **options})
    return found and found.message

  assert fault("aé€😀".encode()) is None
  assert "x: byte 3 is not UTF-8" in fault("aé".encode() + b"\xff" + b"z" * 9)
  assert "x: byte 3 is not UTF-8" in fault("aé€".encode()[:-1])
  assert "x: NUL at byte 4" in fault(b"abcd\0efgh")
  assert fault(b"a\xffb", allow_invalid=True) is None
  assert "NUL at byte 2" in fault(b"a\xff\0", allow_invalid=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_goes_on_from_every_byte_of_its_utf8(tmp_path, monkeypatch, encoding):
  monkeypatch.setattr(blocks, "BLOCK", 5)
  text = "aé€😀\nz" * 4
  (tmp_path / "a.txt").write_bytes(text.encode(encoding))
  for start in range(len(text.encode()) + 1):
    assert b"".join(text_blocks(tmp_path / "a.txt", start)) == text.encode()[start:]
