"""The HTML report in headless Chromium: no console messages, nothing fetched, nothing wider than the screen, themes.

pip install playwright, and Chromium from the system or `playwright install chromium`; then `pytest -m browser`
"""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qwenfit.cli.plan import main

MISSING = [name for name in ("playwright", "jinja2", "matplotlib") if find_spec(name) is None]
pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]
SCREENS = {"desktop": (1200, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of section, of a load small enough to take seconds."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "w.yaml").write_text(
        "title: 'A <small> report & its signs'\nmodel: 0.8b\nengine: llama.cpp\nweights: q8_0\n"
        "deployment: {devices: rtx3060, replicas: 1, seats: 2}\n"
        "workload:\n  users: 2\n  think_s: 5\n  prompt_tokens: {tokens: 300}\n  output_tokens: {tokens: 100}\n"
        "  targets: {p95_ttft_s: 2, p95_tpot_s: 0.1}\ncandidates: [rtx3060]\n"
    )
    assert main(["report", str(folder / "w.yaml"), "--output", str(folder / "w.html")]) == 0
    return folder / "w.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # type: ignore[import-not-found]

    with sync_playwright() as playwright:
        own = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if own is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt install chromium, or playwright install chromium")
        started = playwright.chromium.launch(executable_path=own, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_the_page(browser: Any, report: Path, screen: str, scheme: str) -> None:
    width, height = SCREENS[screen]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    said: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(report.as_uri())
    assert said == []
    assert [url for url in fetched if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() == "A <small> report & its signs"
    assert page.locator("svg").count() == 5 and page.locator("h2").count() == 8
    assert page.locator(".verdict").inner_text().startswith("Yes")
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert _brightness(paper) > 200 if scheme == "light" else _brightness(paper) < 50
    assert abs(_brightness(paper) - _brightness(ink)) > 150
    label = page.locator("svg text").first
    assert abs(_brightness(label.evaluate("node => getComputedStyle(node).fill")) - _brightness(paper)) > 150
    assert label.evaluate("node => node.getBoundingClientRect().height") > 8  # still to be read on a phone
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
    assert len(ids) == len(set(ids))
    page.close()


def test_it_prints(browser: Any, report: Path) -> None:
    """Printed from a dark screen it is black on white, and it has pages."""
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert _brightness(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 250
    assert page.pdf().startswith(b"%PDF")
    page.close()


def test_nothing_in_it_points_outside(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "<script" not in text and "@import" not in text
    outside = [part.split('"')[0] for part in text.replace("url(", 'href="').split('href="')[1:]]
    assert all(target.startswith(("#", "data:")) for target in outside)


def _brightness(color: str) -> float:
    red, green, blue = (float(part) for part in color.split("(")[1].rstrip(")").split(",")[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue
