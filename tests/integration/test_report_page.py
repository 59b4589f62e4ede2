"""The decision's page in headless Chromium: from a file, and in MLflow's own viewer, which frames it without downloads or forms.

Screenshots are written to the folder RETUNE_SCREENSHOTS, or to pytest's temporary folder.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import decisions
import pytest
from checkouts import ROOT
from playwright.sync_api import Browser, BrowserContext, FrameLocator, Page, expect, sync_playwright
from typer.testing import CliRunner

from retune.evaluation.page import Report, decision_page
from retune.evaluation.sample import Sample, read_ratings, unblind

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REPORTS = {
    "classification": decisions.classification,
    "promoted": lambda: decisions.classification(better=0.14),
    "generation": decisions.generation,
}
LOW_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const solid = (colour, below) => {  // any CSS colour over another, as red, green, blue
    canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const behind = (element) => {
    const above = element.parentElement ? behind(element.parentElement) : [255, 255, 255];
    return solid(getComputedStyle(element).backgroundColor, above);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = new Set();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility() || ["script", "title"].includes(element.localName)) continue;
    const under = behind(element), style = getComputedStyle(element);
    const over = solid(element.closest("svg") ? style.fill : style.color, under);
    const [one, other] = [light(over), light(under)].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) found.add(`${element.localName} ${ratio.toFixed(2)}: ${texts.currentNode.data.trim().slice(0, 40)}`);
  }
  return [...found];
}"""
OUTSIDE = """(width) => [...document.querySelectorAll("main *, header *")]
  .filter((element) => !element.closest(".scroll, svg") && element.getBoundingClientRect().right > width + 1)
  .map((element) => element.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("RETUNE_ALL_TIERS"):
            pytest.fail("no Chromium: install it (apt-get install chromium)")
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("RETUNE_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Report, str]]:
    """Kind -> the decision and the address of its page."""
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    for kind, build in REPORTS.items():
        report = build()
        (folder / f"{kind}.html").write_text(decision_page(report), "utf-8")
        made[kind] = (report, (folder / f"{kind}.html").as_uri())
    return made


def watched(context: BrowserContext) -> tuple[Page, list[str]]:
    """A page, and what goes wrong or is asked for outside of it."""
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "blob:")) or wrong.append(request.url))
    return page, wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", REPORTS)
def test_it_reads_at_phone_and_desktop_width_in_light_and_dark(
    browser: Browser, pages: dict[str, tuple[Report, str]], screenshots: Path, kind: str, width: int, scheme: str
) -> None:
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        page, wrong = watched(context)
        page.goto(pages[kind][1])
        page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
        page.screenshot(path=str(screenshots / f"report-{kind}-{width}-{scheme}.png"), full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "no horizontal scrolling of the page"
        assert page.evaluate(OUTSIDE, width) == []
        assert page.evaluate(LOW_CONTRAST) == []
        expect(page.get_by_role("heading", level=1)).to_have_text(f"{pages[kind][0].prompt.name}: {pages[kind][0].decision.verdict}")
        assert page.get_by_text(pages[kind][0].decision.reasons[0]).first.bounding_box()["y"] < 900, "the reason is on the first screen"
        assert wrong == []


def test_it_prints_on_white_without_what_only_a_screen_can_do(
    browser: Browser, pages: dict[str, tuple[Report, str]], screenshots: Path
) -> None:
    with browser.new_context(viewport={"width": 794, "height": 1123}, color_scheme="dark") as context:
        page, wrong = watched(context)
        page.goto(pages["classification"][1])
        page.emulate_media(media="print", color_scheme="dark")
        page.screenshot(path=str(screenshots / "report-print.png"), full_page=True)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("document.documentElement.scrollWidth") <= 794
        expect(page.get_by_role("button", name="Save ratings")).to_be_hidden()
        page.pdf(path=str(screenshots / "report.pdf"), format="A4")
        assert wrong == []


def test_ratings_are_given_out_as_a_file_that_belongs_to_the_sample(browser: Browser, pages: dict[str, tuple[Report, str]]) -> None:
    report, address = pages["generation"]
    with browser.new_context(viewport={"width": 390, "height": 900}) as context:
        page, wrong = watched(context)
        page.goto(address)
        save = page.get_by_role("button", name="Save ratings")
        expect(save).to_be_disabled()
        rate_first_rows(page)
        expect(page.get_by_role("status")).to_have_text("2 of 20 rows graded")
        with page.expect_download() as download:
            save.click()
        assert download.value.suggested_filename == f"ratings-{report.evaluations['candidate'].release[:12]}.json"
        text = Path(download.value.path()).read_text("utf-8")
        assert page.get_by_label("If no file was downloaded").input_value() == text
        expect(page.locator("#key")).to_have_attribute("open", "")
        assert wrong == []
    ratings = unblind(read_ratings(text, "download"), report.sample, "anna", "2026-05-04T10:00:00Z").ratings
    first = dict(report.sample.rows)[ratings[0].id]
    assert [row.id for row in ratings] == [row for row, _ in report.sample.rows[:2]]
    assert (getattr(ratings[0], first), ratings[0].comment) == ("good", 'shorter "and" <better>')


def rate_first_rows(page: Page | FrameLocator) -> None:
    """Grades A good and B bad in two rows, and A alone in the third, which does not count yet."""
    for number in range(3):
        row = page.locator("#ratings > li").nth(number)
        row.get_by_role("radio", name="good", exact=True).first.check()
        if number < 2 and row.get_by_role("radio", name="bad").count() > 1:
            row.get_by_role("radio", name="bad").last.check()
    page.locator(".comment").first.fill(' shorter "and" <better> ')


def test_without_scripts_it_reads_and_offers_no_buttons(browser: Browser, pages: dict[str, tuple[Report, str]]) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(pages["classification"][1])
        expect(page.get_by_role("heading", name="Outputs to read and rate")).to_be_visible()
        expect(page.locator("#ratings fieldset").first).to_be_visible()
        expect(page.get_by_text("Save ratings")).to_be_hidden()
        expect(page.get_by_role("radio")).to_have_count(0)


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "retune.local.mlflow_server", "127.0.0.1", str(port), f"sqlite:///{folder / 'mlflow.db'}"]
    environ = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_TRACKING_URI": ""}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, str(folder / "artifacts")], env=environ, stdout=log, stderr=subprocess.STDOUT)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=3).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "MLflow did not answer within 180 s"
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def test_in_mlflow_it_is_read_rated_and_entered(
    browser: Browser, pages: dict[str, tuple[Report, str]], mlflow: str, screenshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retune.cli import app
    from retune.tasks.page import REPORT, SAMPLE
    from retune.tracking import Tracker

    report = pages["generation"][0]
    name = report.prompt.name
    tracker = Tracker(mlflow, name)
    run = tracker.open("run", "run", {})
    sample = Sample.draw(name, run, decisions.RELEASES, list(report.test["id"]))
    tracker.text(run, decision_page(replace(report, sample=sample)), REPORT)
    tracker.json(run, sample.to_json(), SAMPLE)
    tracker.close(run)
    with browser.new_context(viewport={"width": 1400, "height": 1000}) as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{mlflow}/#/experiments/{tracker.experiment_id()}/runs/{run}/artifacts/{REPORT}")
        framed = page.frame_locator("iframe.mlflow-html-iframe")
        expect(framed.get_by_role("heading", name=f"{name}: PROMOTE")).to_be_visible(timeout=60_000)
        rate_first_rows(framed)
        framed.get_by_role("button", name="Save ratings").click()
        text = framed.get_by_label("If no file was downloaded").input_value()
        page.screenshot(path=str(screenshots / "report-in-mlflow.png"))
    (tmp_path / "ratings.json").write_text(text, "utf-8")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
    monkeypatch.setenv("RETUNE_PROJECT", str(ROOT))
    done = CliRunner().invoke(app, ["rate", name, str(tmp_path / "ratings.json"), "--by", "anna", "--json"])
    assert done.exit_code == 0, done.output
    kept = json.loads(tracker.artifacts(run, "decision/ratings")["decision/ratings/anna.json"])
    assert [row["id"] for row in kept["ratings"]] == [row for row, _ in sample.rows[:2]]
    assert tracker.client.get_run(run).data.metrics["rated_rows"] == 2
