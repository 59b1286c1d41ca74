"""Text of strangers is made safe here, once for each kind of output: a name of a run or a class can be anything.

Every function takes any text, and returns one that its output shows as letters, never as markup, formula or command.
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any

LONGEST = 300
"""Letters of a text that an output shows; the middle of a longer one is left out."""
LONGEST_LINE = 3_000
"""The same for a whole line, such as a warning."""
_MARKDOWN = re.compile(r"[\\`*_{}\[\]#!|~$]|^[-+=](?![\d.])")
"""Letters that mean something in Markdown; signs of a list, a rule or a heading do so at the beginning of a line."""
_NUMBERED = re.compile(r"^(\d+)(?=[.)](\s|$))")
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode's categories of letters that are not seen, or that change how others are seen."""


def one_line(text: Any, longest: int = LONGEST) -> str:
    r"""Return a text as one line that a terminal shows as it is: ``"\x1b[2J"`` as ``\x1b[2J``, a line break as a space.

    Args:
        text: anything; what is not a text is taken as ``str`` gives it.
        longest: letters of the result; the middle of a longer text becomes ``…``.
    """
    letters = text if isinstance(text, str) else _as_text(text)
    if len(letters) > longest:
        half = (longest - 1) // 2
        letters = f"{letters[:half]}…{letters[len(letters) - (longest - 1 - half) :]}"
    return "".join(map(_visible, letters))


def _as_text(value: Any) -> str:
    """Return ``str`` of a value, also of a whole number that has more digits than Python writes."""
    try:
        return str(value)
    except ValueError:
        return "a number of thousands of digits" if isinstance(value, int) else a_type(value)


def represented(value: Any, longest: int = LONGEST) -> str:
    """Return ``repr`` of a value as one line, also of a whole number that has more digits than Python writes."""
    return one_line(repr(value) if not isinstance(value, int) or value.bit_length() < 9999 else value, longest)


def _visible(letter: str) -> str:
    """Return a letter, or what stands for one that cannot be seen: a space, or its escape sequence."""
    if letter in "\t\n\r\v\f\u2028\u2029":
        return " "
    if unicodedata.category(letter) in _HIDDEN:
        return letter.encode("unicode_escape").decode("ascii")
    return letter


def a_type(value: Any) -> str:
    """Return the name of a value's type with its article: "a list", "an ndarray"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' or name.startswith('nd') else 'a'} {name}"


def percent(share: float, decimals: int = 1) -> str:
    """Return a share as all messages and tables write it: 0.975 as "97.5 %"."""
    return f"{100 * share:z.{decimals}f} %"


def for_html(text: Any, longest: int = LONGEST) -> str:
    """Return a text for HTML, as content or as a quoted attribute."""
    return html.escape(one_line(text, longest), quote=True)


def for_markdown(text: Any, longest: int = LONGEST) -> str:
    """Return a text for a line or a table cell of Markdown, without headings, links, formulas or HTML in it."""
    line = _MARKDOWN.sub(r"\\\g<0>", html.escape(one_line(text, longest).strip(), quote=False))
    return _NUMBERED.sub(r"\1\\", line)


def for_csv(cell: Any) -> Any:
    """Return a cell of a CSV file; a text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if not isinstance(cell, str):
        return cell
    line = one_line(cell)
    if re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?( ± .*)?", line, re.IGNORECASE):
        return line
    return f"'{line}" if line.lstrip()[:1] in ("=", "+", "-", "@") and line.strip() != "-" else line


def for_json(text: str) -> str:
    r"""Return JSON with its lone surrogates, which no file can hold, as the escapes that JSON has for them."""
    return re.sub("[\ud800-\udfff]", lambda letter: f"\\u{ord(letter[0]):04x}", text)


def for_matplotlib(text: Any, longest: int = LONGEST) -> str:
    """Return a text for a picture of matplotlib, in which ``$`` begins a formula, and ``_`` a name of no legend."""
    line = one_line(text, longest).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def for_plotly(text: Any) -> str:
    """Return a text for a picture of Plotly, which reads HTML's tags, few of its entities, and templates, ``%{x}``."""
    return html.escape(one_line(text), quote=False).replace('"', "&#34;").replace("'", "&#39;").replace("%{", "%&#123;")
