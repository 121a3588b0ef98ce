"""The report in headless Chromium: it fetches nothing, sorts, and fits a phone."""

import os
import shutil
from pathlib import Path

import pytest

from jaxlm.report.page import write_report

ROOT = Path(__file__).parents[3]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
  api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
  with api.sync_playwright() as playwright:
    installed = shutil.which("chromium") or shutil.which("google-chrome")
    if not installed and not Path(playwright.chromium.executable_path).exists():
      pytest.skip("no Chromium: apt install chromium, or playwright install chromium")
    browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desk"])
def test_both_pages_in_chromium(browser, studies, tmp_path, size):
  screenshots = Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path))
  written = write_report(studies, ROOT, tmp_path / "made up")
  written += write_report(ROOT / "experiments", ROOT, tmp_path / "own")
  for path in written:
    page = browser.new_page(viewport=size)
    requests, errors = [], []
    page.on("request", lambda request, seen=requests: seen.append(request.url))
    page.on("console", lambda message, seen=errors: seen.append(message.text))
    page.on("pageerror", lambda error, seen=errors: seen.append(str(error)))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    name = f"{path.parent.name}_{path.stem}_{size['width']}.png".replace(" ", "_")
    page.screenshot(path=screenshots / name, full_page=path.stem == "index")
    assert not errors
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.close()


@pytest.mark.slow
def test_a_click_on_a_head_sorts_numbers_as_numbers(browser, studies, tmp_path):
  index, _ = write_report(studies, ROOT, tmp_path)
  page = browser.new_page()
  page.goto(index.as_uri())
  page.click("summary:has-text('All 3 runs')")
  head = page.locator("table.runs th", has_text="loss")
  cells = lambda: page.locator("table.runs tbody tr td:nth-child(2)").all_inner_texts()  # noqa: E731
  head.locator("button").click()
  assert cells() == ["1.125", "2.5", "10.25"] and head.get_attribute("aria-sort") == "ascending"
  head.locator("button").click()
  assert cells() == ["10.25", "2.5", "1.125"] and head.get_attribute("aria-sort") == "descending"
  page.close()
