"""Answers, pictures and tables → one HTML file that needs nothing else.

In: plain pieces. Out: the page's text. Promised: no script, no network, no second file; pictures lie in it as data; readable at 500 pixels width and up: wide
tables scroll in their own box; every picture has an alternative text.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from hcsdl.report.answer import Answer
from hcsdl.report.picture import Picture


@dataclass(frozen=True)
class Head:
    """What stands on top of a page.

    Attributes
    ----------
    title : what the report is of.
    subtitle : its inputs and when it was made.
    warnings : sentences that must not be missed, such as that the scores are leaky.
    words : what the answers' terms mean; "" where they need no explanation.
    """

    title: str
    subtitle: str
    warnings: Sequence[str] = ()
    words: str = ""


@dataclass(frozen=True)
class Table:
    """A table on a page: what it shows, column heads (none for pairs of name and value), cells as text."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """One part of the page: `missing` are sentences on what is left out and the command that would make it."""

    id: str
    title: str
    intro: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def has_content(self) -> bool:
        """Whether there is anything besides what is missing."""
        return bool(self.pictures or self.tables)


@cache
def _template() -> object:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("hcsdl.report").joinpath("page.html").read_text(encoding="utf-8"))


def data_uri(data: bytes, mime: str) -> str:
    """Return bytes of type `mime` as a page holds them."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def render_page(head: Head, answers: Sequence[Answer], sections: Sequence[Section], images: Mapping[str, str]) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    answers : shown first.
    sections : shown in this order; those without content are gathered at the end as what is not in the report.
    images : by picture's name, its data URI.
    """
    shown = [section for section in sections if section.has_content]
    return _template().render(  # type: ignore[attr-defined]
        head=head, answers=answers, sections=shown, ids={s.id for s in shown}, images=images,
        absent=[section for section in sections if not section.has_content and section.missing],
    )  # fmt: skip
