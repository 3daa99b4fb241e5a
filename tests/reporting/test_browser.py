"""The report in a real browser: what can be clicked works, at the sizes of a desktop and of a phone, without errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from run_folders import PROMPTS, write_run, write_sweep
from sdtune.reporting import collect, write_report

pytestmark = pytest.mark.browser

SIZES = {"desktop": (1400, 900), "phone": (390, 844)}

CONTRASTS = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b]
    .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const element of document.querySelectorAll("main *, dialog *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("svg, [disabled]")) continue;
    const [a, b] = [rgb(getComputedStyle(element).color), ground(element)].map(luminance).sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const name = `${element.tagName}.${element.className} ${element.textContent.trim().slice(0, 30)}`;
    if (ratio < 4.5) low.push(`${name}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("needs Chrome or Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sweep(tmp_path_factory.mktemp("report") / "sweep", side=64)
    return write_report(collect(folder), folder, "a sweep")


class Opened:
    """A page with the errors that it reported and the addresses that it requested."""

    def __init__(self, browser: Any, file: Path, size: str = "desktop", scheme: str = "light") -> None:
        width, height = SIZES[size]
        viewport = {"width": width, "height": height}
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme, accept_downloads=True)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector(".js-plotly-plot")


@pytest.fixture(params=SIZES)
def opened(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report, request.param)
    yield opened
    opened.context.close()
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def rows(page: Any, table: str) -> list[str]:
    """First two cells of the visible rows of a table."""
    found = page.locator(f"{table} > tbody > tr:visible")
    return [" ".join(found.nth(i).inner_text().split()[:2]) for i in range(found.count())]


def test_page_fits_the_width(opened: Opened) -> None:
    page = opened.page
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"]
    images = page.locator("img[data-image]")
    assert images.count() > 10
    assert page.evaluate("[...document.querySelectorAll('img[data-image]')].every((i) => i.complete && i.naturalWidth)")


def test_tables_are_sorted_filtered_and_have_chosen_columns(opened: Opened) -> None:
    page = opened.page
    assert rows(page, ".ranking")[0] == "1 8"
    head = page.locator(".ranking th:has(button:text-is('lr'))")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    first = page.locator(".ranking > tbody > tr").first
    assert first.locator("td").nth(2).inner_text() == "0.0001"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("section:has(.ranking) input.filter").fill("0.001")
    assert len(rows(page, ".ranking")) == 2
    page.locator("section:has(.runs) input.filter").fill("done")
    assert page.locator(".filtered").inner_text() == "12 of 12"
    page.locator("details.columns summary").click()
    box = page.locator("details.columns label:has-text('artifact_bytes') input")
    column = page.locator(f".ranking th[data-column='{box.get_attribute('value')}']")
    assert not column.is_visible()
    box.check()
    assert column.is_visible()
    box.uncheck()
    assert not column.is_visible()


def test_charts_show_what_is_chosen(opened: Opened) -> None:
    page = opened.page
    select = page.locator("select.choice").first
    assert select.locator("option:checked").inner_text() == "subject_gain"
    select.select_option(label="clip_image")
    assert page.evaluate("chart0.data.map((trace) => trace.visible)").count(True) == 1
    assert page.evaluate("chart0.data[0].visible") is False
    page.locator("#curve-column").select_option("lr/denoiser")
    assert page.evaluate("curve.layout.yaxis.title.text") == "lr/denoiser"
    page.locator("#curve-column").select_option("loss")
    smooth = page.evaluate("curve.data[0].y[1]")
    page.locator("#curve-smoothing").fill("0")
    assert page.evaluate("curve.data[0].y[1]") != smooth
    page.locator("#curve-log").check()
    assert page.evaluate("curve.layout.yaxis.type") == "log"
    assert page.evaluate("curve.data.length") == 12
    assert page.evaluate("curve.data.filter((trace) => trace.showlegend).length") == 4


def test_samples_enlarge_with_steps_and_seeds(opened: Opened) -> None:
    page = opened.page
    page.locator("figure button.open").first.click()
    viewer = page.locator("#viewer")
    assert viewer.is_visible()
    assert PROMPTS[0] in viewer.inner_text()
    assert "step 60 (3 of 3)" in viewer.inner_text()
    image = viewer.locator(".viewer-image").get_attribute("src")
    viewer.locator(".viewer-slider").fill("1")
    assert "step 30 (2 of 3)" in viewer.inner_text()
    assert viewer.locator(".viewer-image").get_attribute("src") != image
    viewer.locator(".viewer-run").select_option("2")
    label = viewer.locator(".viewer-label").inner_text()
    viewer.locator(".viewer-next").click()
    assert viewer.locator(".viewer-label").inner_text() != label
    page.keyboard.press("ArrowLeft")
    assert viewer.locator(".viewer-label").inner_text() == label
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    page.locator("#sample-filter").fill("rank 4")
    assert 0 < page.locator("figure[data-label]:visible").count() < page.locator("figure[data-label]").count()


def test_blind_comparison_counts_wins_with_an_interval(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    page.locator("#blind-start").click()
    shown = page.locator("#blind-stage").inner_text()
    assert "rank" not in shown, "the names are hidden"
    names = [page.locator(f"#blind-{letter} option:checked").inner_text() for letter in "ab"]
    page.keyboard.press("0")
    for _ in range(5):  # two prompts and three training seeds
        page.locator("#blind-1").click()
    result = page.locator("#blind-result").inner_text()
    assert result.startswith(f"{names[0]}: ")
    assert "Equal: 1." in result
    assert "95% interval" in result
    with page.expect_download() as download:
        page.locator("#blind-save").click()
    file = tmp_path / "choices.json"
    download.value.save_as(file)
    choices = json.loads(file.read_text(encoding="utf-8"))
    assert len(choices) == 6
    assert {choice["better"] for choice in choices} <= {"equal", *names}
    wins = sum(choice["better"] == names[0] for choice in choices)
    assert f"{names[0]}: {wins} wins" in result
    page.reload()
    page.locator("#blind-start").click()
    page.locator("#blind-stop").click()
    assert page.locator("#blind-result").inner_text() == result, "choices are kept"
    page.locator("#blind-clear").click()
    assert page.locator("#blind-result").inner_text() == "No choices yet."


def test_equal_settings_are_not_compared(opened: Opened) -> None:
    page = opened.page
    page.locator("#blind-b").select_option("0")
    page.locator("#blind-start").click()
    assert page.locator("#blind-result").inner_text() == "Choose two different settings."


def test_runs_open_and_commands_are_copied(opened: Opened) -> None:
    page = opened.page
    summary = page.locator("details.run summary").first
    summary.click()
    command = page.locator("details.run code").first
    assert command.inner_text().startswith("sdtune train method=lora")
    button = page.locator("details.run button.copy").first
    button.click()
    page.locator("button.copy:text-is('Copied')").wait_for()


def test_everything_is_reached_by_keyboard(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(400):
        page.keyboard.press("Tab")
        name = page.evaluate("(e => e.id || e.className || e.tagName)(document.activeElement)")
        reached.add(name)
        if name == "BODY":
            break
    assert {"copy", "filter", "sort", "open", "curve-column", "blind-start", "choice", "SUMMARY"} <= reached
    page.locator("figure button.open").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#viewer").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(scheme: str, browser: Any, report: Path) -> None:
    opened = Opened(browser, report, "desktop", scheme)
    opened.page.locator("figure button.open").first.click()
    assert opened.page.evaluate(CONTRASTS) == []
    ground = opened.page.evaluate("chart0.layout.paper_bgcolor")
    assert ground == ("#ffffff" if scheme == "light" else "#1a202a")
    opened.context.close()
    assert opened.errors == []


def test_page_reloads_without_losing_its_place(browser: Any, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep")
    write_run(folder / "12", {"seed": 5}, None)
    with_hint = {"subject_gain": 0.1, "dino_image": 0.5}
    file = write_report(collect(folder), folder, "it", reload=1.5)
    opened = Opened(browser, file)
    page = opened.page
    page.locator("section:has(.ranking) th button:text-is('lr')").click()
    page.locator("section:has(.runs) input.filter").fill("done")
    page.locator("section:has(.runs) input.filter").blur()
    page.locator("details.run summary").nth(1).click()
    page.locator("#curve-column").select_option("grad_norm")
    page.evaluate("window.marked = true; scrollTo(0, 700)")
    page.locator(".legendtoggle").first.click()
    page.wait_for_timeout(800)
    (folder / "12" / "metrics.json").write_text('{"subject_gain": 0.99}', encoding="utf-8")
    write_run(folder / "13", {"method.rank": 16}, with_hint)  # another row, and another column
    page.evaluate("scrollTo(0, 700)")
    write_report(collect(folder), folder, "it", reload=600)
    for _ in range(100):
        page.wait_for_timeout(200)
        if not page.evaluate("window.marked === true") and page.locator(".js-plotly-plot").count():
            break
    page.wait_for_timeout(500)
    assert "14 done" in page.locator("main").inner_text(), "the new page is shown"
    assert "legendonly" in page.evaluate("curve.data.map((trace) => trace.visible)"), "hidden settings stay hidden"
    assert page.evaluate("scrollY") == 700
    assert page.locator("section:has(.ranking) th[aria-sort='ascending']").inner_text() == "lr"
    assert page.locator("section:has(.runs) input.filter").input_value() == "done"
    assert page.evaluate("curve.layout.yaxis.title.text") == "grad_norm"
    assert page.locator("details.run[open]").count() == 1
    opened.context.close()
    assert opened.errors == []


@pytest.mark.parametrize("size", SIZES)
def test_page_of_a_single_run_works(size: str, browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"method.rank": 4}, {"clip_image": 0.7, "base_clip_image": 0.5, "steps": 60})
    opened = Opened(browser, write_report(collect(run), run, "a run"), size)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    page.locator("figure button.open").nth(1).click()
    assert "step 30 (2 of 3)" in page.locator("#viewer").inner_text()
    page.locator(".viewer-close").click()
    page.locator("section:has(table.sortable) input.filter").fill("rank")
    assert rows(page, "table.sortable") == ["method.rank 4"]
    assert page.evaluate(CONTRASTS) == []
    opened.context.close()
    assert opened.errors == []
