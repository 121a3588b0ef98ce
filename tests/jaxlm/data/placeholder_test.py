"""What stands in the place of a file is told apart from the file."""

import pytest

from jaxlm.data.placeholder import find_placeholder


@pytest.mark.parametrize(
  "head, kind",
  [
    (b"", "damaged files"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "pointers to files"),
    (b"/annex/objects/SHA256E-s2471--4d7a.safetensors\n", "pointers to files"),
    (b"\xef\xbb\xbf\r\n<!DOCTYPE HTML PUBLIC", "HTML pages"),
    (b"<html lang='en'>", "HTML pages"),
    (b"<?xml version='1.0' encoding='UTF-8'?>\n<Error><Code>AccessDenied", "error messages"),
  ],
)
def test_placeholders_are_recognised(head, kind):
  assert find_placeholder(head).kind.startswith(kind)


@pytest.mark.parametrize(
  "head",
  [b"{}", b" ", b"<!-- a comment of markdown -->", b"<?xml version='1.0'?><svg/>", b"\x10\0\0\0"],
)
def test_other_files_are_none(head):
  assert find_placeholder(head) is None
