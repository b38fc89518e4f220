"""The HTML of every report: one page without outside files, its tables, and its figures at two widths."""

from collections.abc import Callable, Iterable, Sequence
from html import escape

from neuronal_ray.report.figures import Canvas
from neuronal_ray.report.style import STYLE

WIDE, HALF, NARROW = 736, 352, 340
"""Widths of figures in CSS pixels: the page, half of it, a phone."""

Line = tuple[Sequence[str], Sequence[str]]
"""One line of a table: its headings as plain text, and its cells as HTML (see `cell`)."""


def page(title: str, sections: Iterable[str], *, script: str = "") -> str:
    """Return the whole page; `sections` are HTML, `title` is plain text."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>",
            "<body>\n<main>",
            *sections,
            f"</main>{f'<script>{script}</script>' if script else ''}\n</body>\n</html>\n",
        ]
    )


def cell(text: str, *, rank: int = 0, value: float | None = None) -> str:
    """Return a table cell: rank 1 is bold, rank 2 underlined; `value` is what a sortable table sorts by."""
    shown = escape(text)
    shown = f"<b>{shown}</b>" if rank == 1 else f"<u>{shown}</u>" if rank == 2 else shown
    return f"<td>{shown}</td>" if value is None else f'<td data-value="{value!r}">{shown}</td>'


def table(
    lines: Iterable[Line], *, head: Line = ((), ()), kind: str = "plain", chosen: Sequence[int] = (), foot: str = ""
) -> str:
    """Return a table; `head` has the words above the headings and plain text above the cells.

    The lines numbered in `chosen` are emphasized; `foot` is HTML.
    """
    words, columns = head
    top = "".join(f'<th scope="col" class="word">{escape(word)}</th>' for word in words)
    top += "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = []
    for number, (headings, cells) in enumerate(lines):
        mark = ' class="chosen"' if number in chosen else ""
        first = "".join(f'<th scope="row">{escape(heading)}</th>' for heading in headings)
        body.append(f"<tr{mark}>{first}{''.join(cells)}</tr>\n")
    thead = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<table class="{kind}">{thead}<tbody>\n{"".join(body)}</tbody>{foot}</table>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and values."""
    return table((((name,), (cell(value),)) for name, value in rows), kind="facts")


def scrolled(content: str) -> str:
    """Let wide content scroll by itself, so that the page does not."""
    return f'<div class="scroll">{content}</div>'


def details(title: str, content: str, *, count: int | None = None) -> str:
    """Return content that is folded until it is clicked."""
    number = "" if count is None else f" <small>{count}</small>"
    return f"<details><summary>{escape(title)}{number}</summary>\n{content}</details>"


def figure(drawing: str, caption: str) -> str:
    """Return a drawing with its caption, both HTML."""
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def at_both_widths(key: str, label: str, draw: Callable[[Canvas], str]) -> str:
    """Return a drawing for the page and one for a phone: the letters of both are as large as the text around them."""
    wide = draw(Canvas(key=f"{key}-wide", width=WIDE, label=label))
    narrow = draw(Canvas(key=f"{key}-narrow", width=NARROW, label=label))
    return f'<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>'
