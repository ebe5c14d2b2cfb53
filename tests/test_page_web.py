"""The page without a browser: the same answers as the command, hostile input shown as text, files to download."""

from html import unescape
from html.parser import HTMLParser
from re import findall, sub
from time import process_time
from typing import Any
from urllib.parse import urlencode

import pytest

from qwenfit.cli import phrases
from qwenfit.cli.markdown import markdown
from qwenfit.planner import Request, plan

ASKED = "model=9b&gpu=rtx3060&n=1&ctx=256K&seqs=1"
REQUEST = Request(model="9b", devices=("rtx3060",), ctx_tokens=262144)
BOXES = "model=397b&gpu=dgx-spark&n=1&ctx=256K&engine=vllm&nodes=4&interconnect=cx7-200&tp=4"


def text_of(html: str) -> str:
    return sub(r"\s+", " ", unescape(sub(r"<[^>]*>", " ", html)))


def test_the_page_says_what_the_command_says(page: Any) -> None:
    found = plan(REQUEST)
    told = text_of(page().get(f"/?{ASKED}").text)
    best = found.best
    words = [phrases.verdict(found), phrases.question(found), phrases.setup(best), phrases.limits(best), best.command]
    words += [phrases.held(count, share) for count, share in phrases.shares(best)]
    words += [part.amount for share in best.devices for part in phrases.parts(share.memory)]
    words += [*phrases.speed(best), *phrases.costs(best), *best.warnings]
    words += [cell for other in found.plans[1:] if other.fits for cell in phrases.runner_up(other)]
    words += [why for _, why in phrases.refusals(found)]
    assert not [word for word in words if sub(r"\s+", " ", word) not in told]


@pytest.mark.parametrize(
    "asked",
    [
        ASKED,
        BOXES,
        "model=397b&gpu=rtx3060&n=1&ctx=1M&seqs=64",
        "model=27b&gpu=rtx3090&n=2&gpu=rtx3060&n=1&mtp=2&vision=on",
    ],
)
def test_the_answer_is_the_pages(page: Any, asked: str) -> None:
    """What htmx puts in place of the answer is what the whole page has there."""
    client = page()
    whole, moved = client.get(f"/?{asked}"), client.get(f"/answer?{asked}")
    assert whole.status_code == moved.status_code == 200
    told = text_of(whole.text)
    status = findall(r'<p id="says"[^>]*>([^<]*)</p>', moved.text)
    assert len(status) == 1 and unescape(status[0]) in unescape(whole.text)
    for piece in findall(r">([^<>]{12,})<", moved.text):
        assert sub(r"\s+", " ", unescape(piece)).strip() in told, piece


def test_boxes_on_the_page(page: Any) -> None:
    """The form shows what was asked, unfolded, and the answer has the line of every box."""
    html = page().get(f"/?{BOXES}").text
    spread = html[html.index("<details open>") : html.index("Images, too")]
    fields = findall(r'name="(\w+)"[^>]*? value="(\d+)"', spread)
    assert fields == [("nodes", "4"), ("tp", "4")] and spread.count('placeholder="chosen"') == 3
    assert '<option value="cx7-200" selected>' in spread
    asked = Request("397b", ("dgx-spark",), 262144, engine="vllm", nodes=4, interconnect="cx7-200", tp=4)
    lines = phrases.launches(plan(asked).best)
    assert len(lines) == 4 and [unescape(one) for one in findall(r"<pre[^>]*>([^<]*)</pre>", html)] == list(lines)
    assert "<details>\n<summary>Several boxes" in page().get("/").text


def test_a_plan_that_fits_says_what_its_json_is_for(page: Any) -> None:
    client = page()
    assert "qwen-plan deploy plan.json" in client.get(f"/?{ASKED}").text
    assert "qwen-plan deploy" not in client.get("/?model=397b&gpu=rtx3060&n=1").text


def test_where_the_slider_stands(page: Any) -> None:
    moved = page().get("/answer?ctx=256k").headers["hx-trigger"]
    assert moved == '{"moved": {"step": 63, "says": "256,000 tokens"}}'


class Tags(HTMLParser):
    """What a browser would see: the tags, their attributes, and where scripts come from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts: set[str | None] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.add(dict(attrs).get("src"))


def test_every_move_is_cheap(page: Any) -> None:
    """CPU time, so that a busy machine does not matter: 5 to 20 ms measured, of the 100 that a move may take."""
    client, took = page(rate="1000/second"), []
    client.get(f"/?{ASKED}")
    for tokens in (1024 * 2 ** (place / 4) for place in range(40)):
        began = process_time()
        assert client.get(f"/answer?gpu=rtx3090&n=1&ctx={tokens:.0f}").status_code == 200
        took.append(process_time() - began)
    assert sorted(took)[int(len(took) * 0.95)] < 0.1


KEYS = ["model", "gpu", "n", "ctx", "engine", "weights", "kv", "seqs", "mtp", "nodes", "interconnect", "tp", "vision"]
KEYS += ["more"]
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% include 'page.css' %}",
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "a\x00b\x1b[31m\u202e",
    "x" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("key", KEYS)
def test_hostile_words_are_shown_as_text(page: Any, key: str, text: str) -> None:
    client = page()
    for path in ("/", "/answer", "/offers", "/plan.json", "/plan.md"):
        answered = client.get(f"{path}?{urlencode({'gpu': 'rtx3060', 'nodes': '2', key: text})}")
        assert answered.status_code in (200, 422), (path, answered.text[:200])
        if answered.headers["content-type"].startswith("text/html"):
            tags = Tags(answered.text)
            assert tags.scripts <= {"/static/page_htmx.min.js", "/static/page.js"}
            assert not tags.names & {"img", "iframe", "object", "base"}
            assert not [name for name in tags.attributes if name.startswith("on") or name == "style"]
            assert not {"\x1b", "\x00", "\u202e"} & set(answered.text)


def test_what_has_no_answer_leaves_the_form(page: Any) -> None:
    client = page()
    answered = client.get("/?model=27b&gpu=rtx3060&n=1&engine=mlx")
    assert answered.status_code == 422 and "MLX" in text_of(answered.text)
    assert '<option value="qwen3.5-27b" selected>' in answered.text
    unknown = client.get("/?gpu=rtx3061&n=2&ctx=64K")
    assert unknown.status_code == 422 and "<option selected>rtx3061</option>" in unknown.text
    assert 'value="64K"' in unknown.text and "<option selected>" not in client.get("/?gpu=RTX 3060&model=9b").text
    moved = client.get("/answer?ctx=lots")
    assert moved.status_code == 422 and "lots" in text_of(moved.text) and 'id="says"' in moved.text


def test_the_form_has_every_name(page: Any) -> None:
    from qwenfit.profiles.device_names import devices
    from qwenfit.profiles.model_catalog import models

    html = page().get("/").text
    listed = set(findall(r'<option value="([^"]*)"', html))
    assert {one.name for one in devices()} | {one.name for one in models()} <= listed
    assert "auto" not in listed and '<option value="auto">this machine' in page(allow_auto=True).get("/").text


def test_rows_of_devices_without_a_script(page: Any) -> None:
    """The buttons are the form's own: they lead to the page with another row, or one less, and the rest unchanged."""
    client = page()
    more = client.get("/?model=9b&gpu=rtx3090&n=2&ctx=64K&add=1", follow_redirects=False)
    assert more.status_code == 303
    assert more.headers["location"] == "/?gpu=rtx3090&n=2&gpu=rtx3060&n=1&model=9b&ctx=64K#gpu-1"
    less = client.get("/?gpu=rtx3090&n=2&gpu=rtx3060&n=1&drop=0", follow_redirects=False)
    assert less.headers["location"] == "/?gpu=rtx3060&n=1#gpu-0"
    for strange in ("drop=9", "drop=-1", "drop=x", "drop=" + "9" * 5000):
        kept = client.get(f"/?gpu=rtx3090&n=2&{strange}", follow_redirects=False)
        assert kept.headers["location"] == "/?gpu=rtx3090&n=2#gpu-0"
    assert client.get("/?add=1&gpu=%0d%0aX:y&n=1", follow_redirects=False).headers.get("x") is None


def test_offers_come_in_pieces_until_they_are_complete(page: Any) -> None:
    client, asked, asks = page(), "model=122b-a10b&gpu=a100-80gb&n=2&ctx=48K&seqs=3", 1
    while "Looking on" in (told := client.get(f"/offers?{asked}").text):
        asks += 1
        assert asks < 500
    assert "<table>" in told and "$" in told


def test_this_machine_where_it_is_allowed(page: Any) -> None:
    """It is planned as the command plans it, and no report of it leaves the server."""
    asked = "model=0.8b&gpu=auto&n=1&ctx=4K"
    assert page().get(f"/?{asked}").status_code == 422
    told = page(allow_auto=True).get(f"/?{asked}")
    assert told.status_code == 200 and '<option value="auto" selected>' in told.text and "/report.md" not in told.text
    assert "/report.md" in page().get("/?model=0.8b&gpu=rtx3060&n=1&ctx=4K").text


def test_the_plan_as_files(page: Any) -> None:
    client, found = page(), plan(REQUEST)
    as_json, as_markdown = client.get(f"/plan.json?{ASKED}"), client.get(f"/plan.md?{ASKED}")
    assert as_json.json() == found.to_json() and as_markdown.text == markdown(found)
    assert as_json.headers["content-disposition"] == 'attachment; filename="plan.json"'
    assert client.get("/plan.exe").status_code == 422


def test_static_files_are_three(page: Any) -> None:
    client = page()
    for name, kind in (
        ("page.css", "text/css"),
        ("page.js", "text/javascript"),
        ("page_htmx.min.js", "text/javascript"),
    ):
        answered = client.get(f"/static/{name}")
        assert answered.status_code == 200 and answered.headers["content-type"].startswith(kind)
    for name in ("page.py", "../page.py", "..%2fpage.py", "page.html.j2", "", "%00"):
        assert client.get(f"/static/{name}").status_code == 404, name


def test_nothing_is_fetched_from_elsewhere(page: Any) -> None:
    """No address of another host in anything that a browser loads by itself."""
    client = page()
    html = client.get("/").text
    assert not [word for word in findall(r'(?:src|href|action|hx-\w+)="([^"]*)"', html) if "//" in word]
    assert "//" not in sub(r"https?://(?:www\.w3\.org|json-schema\.org)\S*", "", client.get("/static/page.css").text)
    assert "import" not in client.get("/static/page.css").text
