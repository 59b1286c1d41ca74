"""Runs whose every text is hostile: whatever ``compare`` writes or prints shows it as letters, and nothing else.

Outputs are read back by parsers: of HTML, of Markdown, of CSV and of Plotly's text, and by matplotlib itself.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text

from policyskip.comparison.compare import compare, show
from policyskip.evaluation import block_plots, exit_plots
from policyskip.evaluation.figures import class_figures
from policyskip.evaluation.tables import show_classes
from tests.evaluation.test_plots import METRICS, blocks, exits, images
from tests.made_up import drawn, judged, made_up_run

HOSTILE = (
    "<script>alert(1)</script>%{x} &lt;b&gt;",
    "# x [a](http://b) **b**|c",
    "$\\frac{$ [/x][bold]a $b$",
    '=HYPERLINK("http://b")',
    "\x1b[2J\x9b31m\u202eabc \ud800",
    "one\ntwo\r\n- three",
    "_evil",
    "x" * 299,
)
NOT_SHOWN = ("customdata", "legendgroup")
"""Keys of Plotly's traces whose texts only the page's own code, or equality, uses."""
HARMLESS = tuple(f"text{n}" for n in range(len(HOSTILE)))


def runs_of(folder: Path, texts: tuple[str, ...]) -> Path:
    """A run for each text, which is in everything that can hold one; in all of them, the classes have these names."""
    for n, text in enumerate(texts):
        kind = "exits" if n % 2 else "blocks"
        classes = tuple(f"{texts[c % len(texts)]}{c}" for c in range(10))
        decisions = dataclasses.replace(drawn(n, kind=kind, images="same"), classes=classes)
        summary = {"backbone": text, "data": texts[0], "version": text, "warnings": [text], "env": text}
        summary |= judged(0.02, 0.01, 0.03, rival=text) | {"test/verdict_because": text}
        summary |= {"test/rival_low": None} if n % 4 == 3 else {}  # the run's own reason is shown
        name = os.fsdecode(text.encode("utf-8", "surrogatepass").replace(b"/", b":"))[:100]
        made_up_run(
            folder / f"{name}{n % 3}", decisions, texts[n - n % 2], n, summary, penalty=text, other={text: text}
        )
    (folder / f"{texts[5]}\x1b[2Jleft").mkdir()
    (folder / f"{texts[5]}\x1b[2Jleft/config.yaml").write_text("seed: 0")
    return folder


@pytest.fixture
def drawn_texts(monkeypatch) -> list[Text]:
    """The texts of all pictures, which are made in full and not painted."""
    texts: list[Text] = []

    def collect(figure: Figure, file: io.BytesIO, format: str) -> None:
        texts.extend(figure.findobj(Text))

    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda engine, figure: None)
    monkeypatch.setattr(Figure, "savefig", collect)
    return texts


class Tags(HTMLParser):
    """Counts the tags of a page, and keeps their attributes and the page's scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attributes}


def strings_in(content: object) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [text for part in parts for text in strings_in(part)]


def formulas(texts: list[Text]) -> list[str]:
    return [text.get_text() for text in texts if text._preprocess_math(text.get_text())[1]]


def test_nothing_hostile_reaches_an_output_as_anything_but_letters(tmp_path, drawn_texts, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "150")
    runs = runs_of(tmp_path / "runs", HOSTILE)
    made = compare([str(runs)], tmp_path / "out", command="policyskip compare <b>\x1b[2J")
    plain = compare([str(runs_of(tmp_path / "plain", HARMLESS))], tmp_path / "out2")
    assert len(made.collected.results) == len(HOSTILE), [r for _, r in made.collected.left_out]
    show(made)
    printed = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", printed)
    assert "[/x][bold]a" in printed.replace("\n", "") and "\\x1b[2J" in printed

    page, harmless = ((comparison.folder / "index.html").read_text() for comparison in (made, plain))
    assert Tags(page).tags == Tags(harmless).tags and Tags(page).attributes == Tags(harmless).attributes
    (content,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)
    for group in json.loads(content)["groups"]:
        for figure in group["figures"]:
            shown = [{key: value for key, value in trace.items() if key not in NOT_SHOWN} for trace in figure["data"]]
            for text in strings_in(shown):
                assert not re.search(r"<(?!/?b>|br>|/?extra>)|%\{(?!customdata|[xyz]|text)", text), text
                assert not re.search(r"&(?!amp;|lt;|gt;|#\d+;)", text), text

    for path in sorted(made.folder.glob("*.csv")):
        with path.open(newline="") as file:
            for cell in (cell for line in csv.reader(file) for cell in line):
                assert not re.match(r"\s*[=@+]|\s*-\D", cell) or re.fullmatch(r"[+-]?[\d.e+-]+", cell), (path, cell)
    tokens = MarkdownIt("commonmark").enable("table").parse((made.folder / "comparison.md").read_text())
    kinds = Counter(token.type for token in tokens)
    groups, rows = len(made.sections), sum(len(section.rows) for section in made.sections)
    assert (kinds["heading_open"], kinds["table_open"], kinds["tr_open"]) == (groups, groups, groups + rows)
    assert kinds["td_open"] * groups == kinds["th_open"] * rows
    inside = {part.type for token in tokens if token.type == "inline" for part in token.children}
    assert inside <= {"text", "text_special", "softbreak"}
    assert drawn_texts and formulas(drawn_texts) == []


def test_pictures_of_a_run_show_the_names_of_classes_as_letters(tmp_path, drawn_texts, capsys):
    for first, second in (HOSTILE[2::4], HOSTILE[4::2]):
        decisions, (decided, cache) = blocks(), exits()
        decisions, decided = (dataclasses.replace(d, classes=(first, second)) for d in (decisions, decided))
        block_plots.block_pictures(tmp_path / "a", METRICS, decisions, images(), (1, 1))
        exit_plots.exit_gallery(decided, cache, images(), tmp_path / "b.png")
        show_classes(class_figures(decisions))
    assert drawn_texts and formulas(drawn_texts) == []
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", capsys.readouterr().out)
