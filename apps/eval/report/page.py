"""Pages with one script, which sorts and filters their tables: page.html.j2 around a template of its own.

Not for what a page says. A page refers to nothing outside itself; a browser runs the script of its own hash only.
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib import resources

from markupsafe import Markup

from apps.eval.report.build import environment
from libs.flags.canonical import utc_now

_TEMPLATES = "apps.eval.report.templates"


def render_page(template: str, **values: object) -> str:
    """A template that extends page.html.j2, as text."""
    script = _script()
    # For the page's Content-Security-Policy.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shared: dict[str, object] = {"script": script, "script_hash": f"sha256-{digest}", "written": utc_now()}
    return environment().get_template(template).render(**shared, **values)


@lru_cache(maxsize=1)
def _script() -> Markup:
    text = resources.files(_TEMPLATES).joinpath("tables.js").read_text(encoding="utf-8")
    assert "</" not in text, "the script would end where its text says so"
    return Markup(text)
