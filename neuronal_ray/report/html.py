"""HTML by construction: text is escaped wherever it enters a page, and only what is of the type Html is not."""

from collections.abc import Iterable
from html import escape


class Html(str):
    """HTML as it is; any other str is text."""

    __slots__ = ()


def html_of(content: str) -> Html:
    """Return HTML as it is, and text escaped, for the inside of an element or a quoted attribute."""
    return content if isinstance(content, Html) else Html(escape(content))


def fill(template: str, **contents: str) -> Html:
    """Return a template, written in the code, with its {names} replaced by `contents`: by text escaped, or by HTML."""
    return Html(template.format_map({name: html_of(content) for name, content in contents.items()}))


def joined(parts: Iterable[str], separator: str = "") -> Html:
    """Return parts one after the other, text among them escaped."""
    return Html(html_of(separator).join(map(html_of, parts)))
