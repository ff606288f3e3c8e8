"""Text that a model, a recipe or a file name wrote, made safe to show: nothing hidden, nothing reordered, no markup."""

from __future__ import annotations

import re
from html import escape

# Control characters (tab and newline apart), those that reorder or hide text on the screen or have no width (tags that
# spell a hidden text among them), and what XML forbids.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)


def spelt(text: str) -> str:
    r"""Unseen characters as ``\uXXXX`` or ``\UXXXXXXXX``; line ends as newlines."""
    return _UNSEEN.sub(lambda found: _escaped(ord(found[0])), text.replace("\r\n", "\n"))


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def visible(text: str) -> str:
    """`spelt`, escaped for HTML and SVG, quotes included."""
    return escape(spelt(text))
