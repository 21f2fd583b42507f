"""Turn the Sphinx marks of docstrings into plain text, so that the site needs no script for formulas."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|meth|func|mod|attr):<code>~?([^<]*)</code>")
_INLINE = re.compile(r":math:<code>([^<]*)</code>")
_DISPLAY = re.compile(r"<p>\.\. math:: (.*?)</p>", re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Rewrite one page."""
    html = _ROLE.sub(r"<code>\1</code>", html)
    html = _INLINE.sub(r"<code>\1</code>", html)
    return _DISPLAY.sub(lambda match: f"<pre><code>{' '.join(match[1].split())}</code></pre>", html)
