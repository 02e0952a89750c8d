"""One self-contained HTML file: data as JSON, drawn by a small script of our own.

The curves are SVG drawn by some 150 lines of script instead of a plotting library: inlined, that library alone would be
half of the 10 MB a page may have, and colours, print, keyboard and phone come from the page's own style sheet. The page
asks the network for nothing, and its content security policy lets it run no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any


def embed(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside <script type="application/json">, whatever text is in it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # no tag, comment or entity can begin inside
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def render(title: str, data: Mapping[str, Any]) -> bytes:
    """The page, UTF-8."""
    assets = files("rlme.report") / "page"
    css, js = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(js)}'; base-uri 'none'; form-action 'none'"
    )
    page = Template(assets.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=_escape(title), policy=policy, css=css, js=js, data=embed(data)
    )
    return page.encode("utf-8", errors="replace")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
