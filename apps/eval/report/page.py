"""What every page has: the frame around its template, links to pages beside it, and one script that sorts and filters.

Not for what a page says. A page refers to nothing outside itself but to pages that were written with it; a browser runs
the script of its own hash only.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from libs.flags.canonical import utc_now
from libs.flags.catalog import CATALOG
from libs.flags.errors import UserError
from libs.flags.whole_file import write_whole

_TEMPLATES = "apps.eval.report.templates"


class Links(NamedTuple):
    """Pages that lie in the same folder. here: file name of this one. bar: file name -> label, for the top of the page.

    others: file names of further pages, which a text may refer to.
    """

    here: str = ""
    bar: Mapping[str, str] = MappingProxyType({})
    others: frozenset[str] = frozenset()

    def has(self, file: str) -> bool:
        """Whether there is such a page, and it is not this one."""
        return file != self.here and (file in self.bar or file in self.others)


ALONE = Links()


def render_page(template: str, *, links: Links = ALONE, **values: object) -> str:
    """A template that extends page.html.j2, as text."""
    script = _script()
    # For the page's Content-Security-Policy.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shared: dict[str, object] = {"script": script, "script_hash": f"sha256-{digest}", "written": utc_now()}
    return environment().get_template(template).render(**shared, links=links, **values)


def run_page(run: str) -> str:
    """File name of the page of a run, among others."""
    return f"run-{run}.html"


def write_page(page: str, path: Path) -> None:
    """Write a page, whole or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    try:
        write_whole(path, page.encode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {error.strerror}") from error


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Where templates come from and what they may use; a name that is not given is an error."""
    found = Environment(
        loader=PackageLoader("apps.eval.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"bytes": human_bytes, "duration": human_seconds, "when": _when, "axes": describe_axes}
    found.filters["digits"] = digits
    found.globals |= {"run_page": run_page, "known_gates": frozenset(CATALOG)}
    return found


def describe_axes(axes: Mapping[str, object]) -> str:
    """What a score is over, in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in axes.items()) or "all"


def human_bytes(size: float) -> str:
    """A size with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def digits(value: float, count: int) -> str:
    """So many leading digits, and no exponent for large ones: 0.0412, 411.5, 10,230."""
    return f"{value:,.0f}" if abs(value) >= 10**count - 0.5 else f"{value:.{count}g}"


def human_seconds(seconds: float) -> str:
    """A duration in the two largest units that matter."""
    if not 60 <= seconds < 1e9:
        return f"{seconds:.1f} s" if seconds < 60 else f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _when(timestamp: str) -> str:
    """RFC 3339 to the second, for reading."""
    return f"{timestamp[:10]} {timestamp[11:19]} UTC"


@lru_cache(maxsize=1)
def _script() -> Markup:
    text = resources.files(_TEMPLATES).joinpath("tables.js").read_text(encoding="utf-8")
    assert "</" not in text, "the script would end where its text says so"
    return Markup(text)
