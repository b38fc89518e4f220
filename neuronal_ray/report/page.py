"""The HTML of every report: one page without outside files, its tables, and its figures at two widths.

Every function takes text, which it escapes, or Html.
"""

from collections.abc import Callable, Iterable, Sequence

from neuronal_ray.report.figures import Canvas
from neuronal_ray.report.html import Html, fill, html_of, joined
from neuronal_ray.report.style import MARK, STYLE

WIDE, HALF, NARROW = 736, 352, 340
"""Widths of figures in CSS pixels: the page, half of it, a phone."""

Line = tuple[Sequence[str], Sequence[str]]
"""One line of a table: its headings, and its cells (see `cell`; of the head: more headings)."""


def page(title: str, sections: Iterable[str], *, script: Html = Html("")) -> Html:  # noqa: B008  (a constant)
    """Return the whole page."""
    return fill(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="generator" content="{mark}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>{title}</title>\n<style>{style}</style>\n</head>\n"
        "<body>\n<main>\n{sections}\n</main>{script}\n</body>\n</html>\n",
        mark=MARK,
        title=title,
        style=Html(STYLE),
        sections=joined(sections, "\n"),
        script=fill("<script>{script}</script>", script=script) if script else "",
    )


def section(title: str, content: str) -> Html:
    """Return a heading and what stands below it."""
    return fill("<h2>{title}</h2>\n{content}", title=title, content=content)


def cell(text: str, *, rank: int = 0, value: float | None = None) -> Html:
    """Return a table cell: rank 1 is bold, rank 2 underlined; `value` is what a sortable table sorts by."""
    shown = fill({1: "<b>{text}</b>", 2: "<u>{text}</u>"}.get(rank, "{text}"), text=text)
    if value is None:
        return fill("<td>{shown}</td>", shown=shown)
    return fill('<td data-value="{value}">{shown}</td>', value=repr(value), shown=shown)


def table(
    lines: Iterable[Line],
    *,
    head: Line = ((), ()),
    kind: str = "plain",
    chosen: Sequence[int] = (),
    foot: str = "",
) -> Html:
    """Return a table; `head` has the words above the headings, and above the cells.

    The lines numbered in `chosen` are emphasized.
    """
    words, columns = head
    top = joined(fill('<th scope="col" class="word">{word}</th>', word=word) for word in words)
    top = joined([top, *(fill('<th scope="col">{column}</th>', column=column) for column in columns)])
    body = joined(
        fill(
            "<tr{mark}>{first}{cells}</tr>\n",
            mark=Html(' class="chosen"') if number in chosen else "",
            first=joined(fill('<th scope="row">{heading}</th>', heading=heading) for heading in headings),
            cells=joined(cells),
        )
        for number, (headings, cells) in enumerate(lines)
    )
    return fill(
        '<table class="{kind}">{head}<tbody>\n{body}</tbody>{foot}</table>',
        kind=kind,
        head=fill("<thead><tr>{top}</tr></thead>", top=top) if top else "",
        body=body,
        foot=foot,
    )


def facts(rows: Iterable[tuple[str, str]]) -> Html:
    """Return a table of names and values."""
    return table((((name,), (cell(value),)) for name, value in rows), kind="facts")


def scrolled(content: str) -> Html:
    """Let wide content scroll by itself, so that the page does not."""
    return fill('<div class="scroll">{content}</div>', content=content)


def details(title: str, content: str, *, count: int | None = None) -> Html:
    """Return content that is folded until it is clicked."""
    number = "" if count is None else fill(" <small>{count}</small>", count=str(count))
    template = "<details><summary>{title}{number}</summary>\n{content}</details>"
    return fill(template, title=title, number=number, content=content)


def figure(drawing: str, caption: str) -> Html:
    """Return a drawing with its caption."""
    return fill("<figure>{drawing}<figcaption>{caption}</figcaption></figure>", drawing=drawing, caption=caption)


def at_both_widths(key: str, label: str, draw: Callable[[Canvas], Html]) -> Html:
    """Return a drawing for the page and one for a phone: the letters of both are as large as the text around them."""
    return fill(
        '<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>',
        wide=html_of(draw(Canvas(key=f"{key}-wide", width=WIDE, label=label))),
        narrow=html_of(draw(Canvas(key=f"{key}-narrow", width=NARROW, label=label))),
    )
