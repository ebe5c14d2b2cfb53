"""The page in headless Chromium: every move answers in time, by keyboard, on a phone, in light and dark, read aloud.

pip install -e '.[serve]' playwright axe-playwright-python, and Chromium from the system or by `playwright install
chromium`; then `pytest -m browser`
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwenfit.cli.phrases import launches
from qwenfit.planner import Request, plan

NEEDED = ("playwright", "fastapi", "uvicorn", "jinja2", "limits")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
ASKED = "?model=9b&gpu=rtx3060&n=1&ctx=256K"
BOXES = "?model=397b&gpu=a100-80gb&n=8&nodes=2&ctx=256K&engine=vllm&weights=bf16"
MOVES, MOVE_BOUND_S = 24, 0.4  # 0.1 s on an idle machine; this bound is for one that runs six other things


class Opened(NamedTuple):
    page: Any
    said: list[str]  # by the console
    fetched: list[str]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    started = subprocess.Popen(
        [sys.executable, "-m", "qwenfit.cli.plan", "serve", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout
    yield started.stdout.readline().strip()
    started.terminate()
    started.wait(20)


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


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page; at the end, nothing was said on the console and nothing was fetched from elsewhere."""
    contexts, pages = [], []

    def open_page(query: str = ASKED, silent: bool = True, **told: Any) -> Any:
        context = browser.new_context(**{"viewport": DESKTOP, **told})
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address.rstrip("/"))
        page, said, fetched = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(f"{address}{query}")
        contexts.append(context)
        pages.append((page, said, fetched, silent))
        return page

    yield open_page
    for _, said, fetched, silent in pages:
        assert not silent or said == []
        assert [url for url in fetched if not url.startswith((address, "data:"))] == []
    for context in contexts:
        context.close()


def says(page: Any) -> str:
    return page.locator("#says").inner_text()


def told(model: str, ctx_tokens: int, *devices: str) -> str:
    """What the planner says of it, as the page's first line begins."""
    found = plan(Request(model=model, devices=devices, ctx_tokens=ctx_tokens))
    share = min(found.best.devices, key=lambda one: one.free_bytes)
    return f"{share.memory.total.mid / (1 << 30):.2f} GiB of {share.usable_bytes / (1 << 30):.2f} GiB"


def expect_answer(page: Any, words: str) -> None:
    page.wait_for_function("words => document.getElementById('says').textContent.includes(words)", arg=words)


def test_the_slider_by_keyboard(opened: Any) -> None:
    page = opened()
    assert told("9b", 262144, "rtx3060") in says(page)
    page.locator("#slider").focus()
    page.keyboard.press("ArrowLeft")
    expect_answer(page, told("9b", 245760, "rtx3060"))
    assert page.locator("#ctx").input_value() == "240K"
    assert page.locator("#slider").get_attribute("aria-valuetext") == "245,760 tokens"
    page.keyboard.press("Home")
    expect_answer(page, told("9b", 1024, "rtx3060"))
    page.keyboard.press("End")
    expect_answer(page, "Does not fit")
    assert page.locator("#ctx").input_value() == "1M"
    assert page.evaluate("document.activeElement.id") == "slider"


def test_every_move_answers_in_time(opened: Any) -> None:
    """From the key to the changed answer on the screen: 95 of 100 within the bound."""
    page = opened()
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(500)
    took = []
    for move in range(MOVES):
        before = page.locator("#answer h2").first.inner_text()
        page.evaluate("window.began = performance.now()")
        page.keyboard.press("ArrowLeft" if move < MOVES // 2 else "ArrowRight")
        took.append(
            page.wait_for_function(
                "before => document.querySelector('#answer h2').textContent.replace(/\\\\s+/g, ' ').trim() !== "
                "before.replace(/\\\\s+/g, ' ').trim() && (performance.now() - window.began) / 1000",
                arg=before,
                polling="raf",
            ).json_value()
        )
    took.sort()
    print(f"move to answer: p50 {took[len(took) // 2] * 1000:.0f} ms, p95 {took[int(len(took) * 0.95)] * 1000:.0f} ms")
    assert took[int(len(took) * 0.95)] < MOVE_BOUND_S


def test_a_typed_context_moves_the_slider(opened: Any) -> None:
    page = opened(silent=False)
    page.locator("#ctx").fill("64K")
    expect_answer(page, told("9b", 65536, "rtx3060"))
    assert page.locator("#slider").input_value() == "48"
    page.locator("#ctx").fill("lots")
    expect_answer(page, "lots")
    assert page.locator("#answer").inner_text().startswith("No answer")
    assert page.locator("#offers").inner_text() == "" == page.locator("#rest").inner_text()
    page.locator("#ctx").fill("32K")
    page.locator("#offers table").wait_for()


def test_a_refusal_says_so_and_the_next_move_answers_again(opened: Any) -> None:
    page = opened(silent=False)  # Chromium logs every 422
    page.locator("#engine").select_option("mlx")
    expect_answer(page, "MLX")
    page.locator("#engine").select_option("vllm")
    expect_answer(page, "GiB of 11.63 GiB")
    assert "vllm" in page.locator("#command").inner_text()


def test_the_other_fields(opened: Any) -> None:
    page = opened()
    page.locator("#model").select_option("qwen3.5-4b")
    expect_answer(page, told("4b", 262144, "rtx3060"))
    page.locator("#gpu-0").select_option("rtx3090")
    expect_answer(page, told("4b", 262144, "rtx3090"))
    page.locator("#seqs").fill("4")
    page.locator("#weights").select_option("q4_k_m")
    page.locator("#kv").select_option("q8_0")
    page.get_by_label("Images, too").check()
    page.wait_for_function("() => document.querySelector('#answer').textContent.includes('with vision')")
    assert "weights q4_k_m, KV cache q8_0" in page.locator("#answer").inner_text()
    assert "x 4 sequences" in page.locator("#answer").inner_text()


def test_several_boxes(opened: Any, address: str) -> None:
    """The fold opens by keyboard; boxes and their link are answered, linked, and copied box by box."""
    page = opened("?model=397b&gpu=dgx-spark&n=1&ctx=64K&engine=vllm")
    assert not page.locator("#nodes").is_visible()
    page.locator("summary", has_text="Several boxes").focus()
    page.keyboard.press("Enter")
    page.locator("#nodes").fill("4")
    page.locator("#interconnect").select_option("roce-100")
    page.locator("#tp").fill("4")
    page.wait_for_function("() => document.querySelector('#answer').textContent.includes('4 boxes over roce-100')")
    page.wait_for_function("() => document.querySelector('#answer').textContent.includes('tensor parallel 4')")
    asked = Request("397b", ("dgx-spark",), 65536, engine="vllm", nodes=4, interconnect="roce-100", tp=4)
    lines = launches(plan(asked).best)
    page.get_by_text("and in the other boxes").click()
    page.locator("[data-copy='#command-3']").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == lines[3]
    page.wait_for_function("() => location.search.includes('nodes=4') && location.search.includes('tp=4')")
    again = opened(page.url.removeprefix(address), silent=False)
    for field in ("#nodes", "#interconnect", "#tp", "#pp", "#dp", "#ep"):
        assert again.locator(field).is_visible()
        assert again.locator(field).input_value() == page.locator(field).input_value(), field
    assert says(again) == says(page)
    again.locator("#nodes").fill("1")  # the link between boxes stays in the form, and does not matter
    expect_answer(again, "tp 4")


def test_copy(opened: Any) -> None:
    page = opened()
    command = plan(Request(model="9b", devices=("rtx3060",), ctx_tokens=262144)).best.command
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == command
    page.get_by_role("button", name="Copy the link").click()
    page.get_by_role("button", name="Copied").nth(1).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#link").evaluate("link => link.href")


def test_a_link_restores_the_page(opened: Any, address: str) -> None:
    page = opened()
    page.get_by_role("button", name="Add an unlike device").click()
    page.locator("#gpu-1").select_option("rtx3090")
    page.get_by_label("How many of device 2").fill("2")
    page.locator("#slider").focus()
    page.keyboard.press("ArrowLeft")
    page.locator("#mtp").fill("2")
    page.locator("#mtp").blur()
    page.wait_for_function("() => location.search.includes('mtp=2') && location.search.includes('gpu=rtx3090&n=2')")
    again = opened(page.url.removeprefix(address))
    for field in ("#ctx", "#seqs", "#mtp", "#gpu-0", "#gpu-1", "#slider"):
        assert again.locator(field).input_value() == page.locator(field).input_value(), field
    assert again.locator("#ctx").input_value() == "240K" and says(again) == says(page)
    assert again.locator("#answer").inner_text() == page.locator("#answer").inner_text()
    assert page.locator("#answer details").evaluate_all("all => all.map(fold => fold.open)")[:2] == [True, False]


def test_what_was_unfolded_stays_unfolded(opened: Any) -> None:
    page = opened()
    page.get_by_text("Ruled out", exact=True).click()
    page.locator("#slider").focus()
    page.keyboard.press("ArrowLeft")
    expect_answer(page, told("9b", 245760, "rtx3060"))
    assert page.locator("details", has_text="Ruled out").evaluate("fold => fold.open")
    assert not page.locator("details", has_text="Energy and money").evaluate("fold => fold.open")


def test_devices_that_would_do_follow(opened: Any) -> None:
    page = opened()
    first = page.locator("#offers table").inner_text()
    page.locator("#ctx").fill("1M")
    page.wait_for_function("before => !document.querySelector('#offers').innerText.includes(before)", arg=first)
    page.wait_for_function("() => !document.querySelector('#offers').textContent.includes('Looking on')")
    assert "$" in page.locator("#offers table").inner_text()


@pytest.mark.parametrize("query", [ASKED, "?model=27b&gpu=rtx3090&n=2&gpu=rtx3060&n=1&ctx=1M&seqs=4", BOXES])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_can_be_read(opened: Any, screen: dict[str, int], scheme: str, query: str) -> None:
    """No sideways scrolling; axe finds nothing (names, roles, contrast); the verdict is in sight without scrolling."""
    page = opened(query, viewport=screen, color_scheme=scheme, has_touch=screen is PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= screen["width"]
    box = page.locator("#says").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= screen["height"]
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert (brightness(paper) > 200) is (scheme == "light") and abs(brightness(paper) - brightness(ink)) > 150
    for control in page.locator("input, select, button").all():
        assert control.evaluate("one => one.labels?.length || one.ariaLabel || one.textContent.trim()")
        if screen is PHONE and control.is_visible() and control.get_attribute("type") not in ("checkbox", "submit"):
            assert control.bounding_box()["height"] >= 24  # WCAG 2.2, target size
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="not installed: axe-playwright-python")
    for fold in page.locator("details").all():
        fold.evaluate("fold => fold.open = true")
    found = axe.Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found.response["violations"]] == []


def test_without_a_script(opened: Any) -> None:
    """The form is a form: it asks, and adds a device, where nothing runs in the browser."""
    page = opened(java_script_enabled=False)
    page.locator("#ctx").fill("64K")
    page.locator("#ctx").press("Enter")
    assert told("9b", 65536, "rtx3060") in says(page)
    page.get_by_role("button", name="Add an unlike device").click()
    assert page.locator("select[name=gpu]").count() == 2 and page.locator("#ctx").input_value() == "64K"


def brightness(color: str) -> float:
    red, green, blue = (float(part) for part in color.split("(")[1].rstrip(")").split(",")[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue
