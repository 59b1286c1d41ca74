"""The page of a comparison: one file, nothing fetched, and in a real browser it hovers and clicks as promised."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from policyskip.comparison.compare import compare
from policyskip.comparison.sources import ExampleImages
from policyskip.data import digits
from tests.made_up import drawn, judged, made_up_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    images = digits(torch.device("cpu"), 1, 1, 60).test.fingerprint()
    for seed in range(2):
        summary = judged(0.02 + seed / 1000, 0.01, 0.1, rival="2 <b>blocks")
        made_up_run(folder / f"runs/blockdrop-{seed}", drawn(seed, images=images), seed=seed, summary=summary)
    made_up_run(folder / "runs/evil", drawn(5, images=images), "</script><b>evil", summary={"backbone": "<i>net"})
    exits = drawn(0, "msdnet", kind="exits", network="", images=images)
    made_up_run(folder / "runs/msdnet-0", exits, "msdnet", summary={"backbone": "msdnet"})
    made = compare(
        [str(folder / "runs")], folder / "out", load_images=ExampleImages(), command="policyskip compare a<b"
    )
    return made.folder / "index.html"


def test_the_page_is_one_file_that_asks_for_nothing(page):
    text = page.read_text()
    assert 3e6 < len(text) < 10e6
    assert "default-src 'none'" in text
    ours = text.replace(re.findall(r"<script>(.*?)</script>", text, re.S)[0], "")  # Plotly's own code names hosts
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", ours)
    assert "<b>evil" not in ours and "<i>net" not in ours and "a&lt;b" in ours


def test_its_content_can_be_read(page):
    text = page.read_text()
    (content,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text, re.S)
    (group,) = json.loads(content)["groups"]
    assert set(group["galleries"]) == {"blockdrop-0", "blockdrop-1", "evil", "msdnet-0"}
    parts, *_ = group["galleries"].values()
    assert [part["title"] for part in parts] == ["least computed", "most computed", "wrong"]
    used = {item["image"] for g in group["galleries"].values() for part in g for item in part["items"]}
    assert {str(index) for index in used} <= set(json.loads(content)["images"]["g0"])


def test_the_page_leads_with_the_verdicts_which_need_no_script(page):
    """A row that pays is above two that older versions judged, coloured, and with a picture of its interval."""
    html = page.read_text().partition("<script")[0]
    places = [html.index(text) for text in ('<p class="verdict">', '<table class="verdicts">', '<p class="said">')]
    assert places == sorted(places) and html.index("<table>") > places[-1]
    table = html[places[1] : html.index("</table>", places[1])]
    lines = re.findall(r"<tr><td>(.*?)</tr>", table)
    assert lines[0].startswith("blockdrop</td>") and len(lines) == 3
    assert 'class="answer pays">pays<' in lines[0] and "+2.05 (+1.00 to +10.00)" in lines[0]
    assert "2 &lt;b&gt;blocks" in lines[0] and '<svg class="interval pays"' in lines[0]
    assert all('class="answer open">not shown<' in line and "older version" in line for line in lines[1:])
    assert 'cx="70.0"' not in lines[0] and all("<svg" not in line for line in lines[1:])
    css = page.read_text().partition("<style>")[2].partition("</style>")[0]
    for name in ("--good", "--bad", "--middling", "--faint"):
        assert css.count(f"{name}: #") == 2  # one for light pages, one for dark ones


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it_hovers_and_clicks(page, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900}).new_page()
        requests: list[str] = []
        messages: list[str] = []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.goto(page.as_uri())
        tab.wait_for_function("document.body.dataset.drawn === 'yes'")
        assert tab.locator("h1").inner_text() == "4 runs compared"
        assert tab.locator(".plot .main-svg").count() >= 6
        dark = sum(
            int(x) for x in re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
        )
        assert (dark < 150) == (scheme == "dark")
        ink = tab.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
        assert (sum(int(x) for x in re.findall(r"\d+", ink)[:3]) > 400) == (scheme == "dark")

        point = tab.evaluate(
            """() => { const plot = document.getElementById('g0-0');
            plot.scrollIntoView({ block: 'center' });
            const trace = plot.data.findIndex((t) => t.name === 'blockdrop, runs'), box = plot.getBoundingClientRect();
            const layout = plot._fullLayout, x = plot.data[trace].x[1], y = plot.data[trace].y[1];
            return [box.left + layout._size.l + layout.xaxis.l2p(x), box.top + layout._size.t + layout.yaxis.l2p(y)]; }"""
        )
        tab.mouse.move(*point)
        tab.wait_for_selector(".hoverlayer .hovertext")
        assert "blockdrop-1" in tab.locator("#g0-0 .hoverlayer").text_content()
        assert tab.locator("#g0-gallery").get_attribute("data-run") != "blockdrop-1"
        tab.mouse.click(*point)
        tab.wait_for_selector("#g0-gallery[data-run='blockdrop-1']")
        pictures = tab.locator("#g0-gallery img")
        assert pictures.count() >= 12 and pictures.first.evaluate("image => image.naturalWidth") == 20
        browser.close()
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    assert messages == []


def test_a_row_is_right_on_an_image_only_if_all_its_seeds_are_and_no_list_is_empty(page):
    """Of blockdrop's two seeds, one is right on some of these images, the other wrong."""
    html = page.read_text()
    cards = re.findall(r'<div class="card wide" title="([^"]*)">(.*?)</div>', html)
    assert any(">1 right in some seeds</span>: blockdrop<" in card for _, card in cards)
    for title, card in cards:
        assert ">0 " not in card and "none" not in title and not re.search(r"</span>: *(<br>|$)", card)
        assert sum(map(int, re.findall(r">(\d+) (?:right|wrong)", card))) == 3
    assert "A row is right, or wrong, where all its seeds are." in html
