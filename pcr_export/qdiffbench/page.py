"""A page of tables, charts and pairs of images as one HTML file that asks the network for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pcr_export.qdiffbench.image_pairs import PairGroup
from pcr_export.write_files import write_text

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells are text; the first of a row is its header."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True  # all columns but the first are figures
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the figures that stand out


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing and what it says in words."""

    svg: str  # an <svg> element
    alt: str
    caption: str
    wide: bool = False  # too wide for a phone: it scrolls in its own box there

    @property
    def markup(self) -> Markup:
        """The element with its name for those who can't see it."""
        return Markup(self.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.alt)}" ', 1))


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it, in this order."""

    heading: str
    notes: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    groups: Sequence[PairGroup] = ()
    names: tuple[str, str] = ("FP32", "quantized")  # of the left and the right image of a pair


def write_page(path: Path, title: str, summary: Sequence[tuple[str, str]], sections: Sequence[Section]) -> Path:
    """Write the page, through a temporary name. Same content, same bytes.

    Args:
        title: of the page, its first heading.
        summary: (what, value) of the lines below the title.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(TEMPLATE).render(title=title, summary=summary, sections=sections)
    write_text(path, html)
    return path
