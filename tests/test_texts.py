"""Text of strangers in every output: it is shown as letters, and is never markup, a formula or a command."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.text import Text

from policyskip import texts

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
def test_rich_shows_a_text_as_it_is(text):
    assert Text.from_markup(texts.for_rich(text) + "[bold]z[/bold]").plain == texts.one_line(text) + "z"


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


def test_markdown_has_no_links_tables_or_headings():
    assert texts.for_markdown("# a|b [c](d) <e> $f$\n# g") == r"\# a\|b \[c\]\(d\) &lt;e&gt; \$f\$ \# g"


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
