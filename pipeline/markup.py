"""Text that a model, a recipe or a file name wrote, made safe to show: nothing hidden, nothing reordered, no markup."""

from __future__ import annotations

import re
from html import escape

# Control characters (tab and newline apart), those that reorder or hide text on the screen, and what XML forbids.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def spelt(text: str) -> str:
    r"""Unseen characters as ``\uXXXX``; line ends as newlines."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def visible(text: str) -> str:
    """`spelt`, escaped for HTML and SVG, quotes included."""
    return escape(spelt(text))
