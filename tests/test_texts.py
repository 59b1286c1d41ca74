"""Text of strangers in every output: it is shown as letters, and is never markup, a formula or a command."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.table import Table

from policyskip import texts
from policyskip.evaluation.tables import console

PACKAGE = Path(texts.__file__).parent
HOSTILE = (
    *("[/x]", "[link=file:///x]a[/link]", "\\[x]", "\\\\[x]", "a\\", "$\\frac{$", "a$b", "\\$", "<script>x</script>"),
    *("# a\n# b", "[a](http://b)", "|", "\x1b[2J", "\x9b31m", "\u202eabc", "\ud800", "=HYPERLINK(1)", "\t=1", "@x"),
)


def test_one_line_shows_what_cannot_be_seen():
    assert texts.one_line("a\nb\tc") == "a b c"
    assert texts.one_line("\x1b[2J\u202e\ud800\x9b") == "\\x1b[2J\\u202e\\ud800\\x9b"
    assert texts.one_line("é中 ✓") == "é中 ✓"
    assert texts.one_line(5) == "5"


def test_a_long_text_keeps_its_ends():
    shown = texts.one_line("a" * 10**5 + "z", longest=11)
    assert shown == "aaaaa…aaaaz"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_console_shows_a_text_as_it_is(text, capsys):
    """As a line, as a title, as a heading and as a cell."""
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console().print(text)
    console().print(table)
    assert capsys.readouterr().out.count(texts.one_line(text).strip()) >= 4


@pytest.mark.parametrize("text", HOSTILE)
def test_matplotlib_draws_a_text_as_letters(text):
    figure = Figure()
    drawn = figure.text(0, 0, texts.for_matplotlib(text))
    figure.savefig(io.BytesIO())
    shown, is_formula = drawn._preprocess_math(drawn.get_text())
    assert (shown, bool(is_formula)) == (texts.one_line(text), False)


@pytest.mark.parametrize("text", HOSTILE)
def test_html_has_no_tags(text):
    for safe in (texts.for_html(text), texts.for_plotly(text)):
        assert "<" not in safe and '"' not in safe and "\n" not in safe
    assert "%{" not in texts.for_plotly(f"{text}%{{x}}")


MARKDOWN = (
    *("- a", "+ a", "---", "===", "12) x", "1. x", "> q", "    code", "```", "*a*_b_", "![x](y)", "[x]: http://y"),
    *("<http://a.b>", "&lt;b&gt;", "~~~", "a\\", "# a|b\n# c", "<b>", "`a`"),
)


@pytest.mark.parametrize("text", [*HOSTILE, *MARKDOWN])
def test_markdown_shows_a_text_as_letters(text):
    """A reader of Markdown finds one paragraph of text in it, and one cell where it stands in a table."""
    reader = MarkdownIt("commonmark").enable("table")
    opening, inline, closing = reader.parse(texts.for_markdown(text))
    assert (opening.type, closing.type) == ("paragraph_open", "paragraph_close")
    assert {part.type for part in inline.children} <= {"text", "text_special"}
    assert "".join(part.content for part in inline.children) == texts.one_line(text).strip()
    table = reader.parse(f"| a | b |\n| --- | --- |\n| {texts.for_markdown(text)} | z |\n")
    assert [part.type for part in table].count("td_open") == 2


def test_json_with_lone_surrogates_can_be_written_and_read():
    content = {"ä \udcff": ["\ud800", "中"]}
    text = texts.for_json(json.dumps(content, ensure_ascii=False))
    assert "ä" in text and json.loads(text.encode()) == content


def test_numbers_stay_as_they_are_in_markdown():
    assert texts.for_markdown("+0.72 ± 0.10 (x)") == "+0.72 ± 0.10 (x)" and texts.for_markdown("-1.5") == "-1.5"


@pytest.mark.parametrize("cell", ["=1+1", "+1+cmd", "-cmd", "@SUM(1)", "\t=1", "\r=1", " =1", "-1-cmd"])
def test_a_formula_in_csv_gets_an_apostrophe(cell):
    assert texts.for_csv(cell).startswith("'")


@pytest.mark.parametrize("cell", ["-", "-1.5", "+0.72 ± 0.10", "-1e-3", "a=b", 3, None, 2.5])
def test_numbers_in_csv_stay_as_they_are(cell):
    assert texts.for_csv(cell) == cell


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=[]), max_size=40))
def test_every_text_is_one_line_of_valid_letters(text):
    line = texts.one_line(text)
    assert line.encode("utf-8") is not None and len(line.splitlines()) <= 1 and "\x1b" not in line


def test_all_tables_are_printed_on_the_plain_console():
    """Another console of rich would read markup in names of runs and classes."""
    package = Path(texts.__file__).parent
    sources = {str(path.relative_to(package)): path.read_text("utf-8") for path in package.rglob("*.py")}
    users = [name for name, source in sources.items() if re.search(r"rich(\.console|\.markup| import print)", source)]
    assert sorted(users) == ["evaluation/tables.py", "runs/progress.py"]  # which writes rich's Text, without markup


def test_articles_and_percent():
    values: tuple[object, ...] = (np.zeros(1), [], 3, ValueError(), 0.5)
    assert list(map(texts.a_type, values)) == ["an ndarray", "a list", "an int", "a ValueError", "a float"]
    assert [texts.percent(0.97654, n) for n in (0, 1, 2)] == ["98 %", "97.7 %", "97.65 %"]
    assert texts.percent(-1e-9) == "0.0 %"


def test_messages_have_one_way_to_write_percent_and_no_article_before_a_type_s_name():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text("utf-8")
        assert not re.search(r":\.\d%\}", source), path
        assert not re.search(r"\ban? \{type\(\w+\)\.__name__\}", source), path
        assert not re.search(r"\{type\(error\)\.__name__\}: \{", source), path


def test_a_number_of_thousands_of_digits_is_no_error():
    assert texts.one_line(16**5000) == texts.represented(16**5000) == "a number of thousands of digits"
    assert texts.represented("a\n") == "'a\\n'"
