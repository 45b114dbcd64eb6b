"""Text that comes from a model's, a folder's or a field's name, made harmless where it is shown.

A name may hold escapes that move the cursor of a terminal, a formula that a spreadsheet carries out, or HTML.
"""

from __future__ import annotations

from types import MappingProxyType

# Control characters but tab and line break, and marks that turn the direction of text.
_CONTROLS = MappingProxyType(
    dict.fromkeys(
        [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029]
    )
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def without_controls(text: str) -> str:
    """Return the text without characters that act on a terminal."""
    return text.translate(_CONTROLS)


def csv_cell(text: str) -> str:
    """Return the text so that a spreadsheet shows it, whatever it begins with."""
    plain = without_controls(text)
    return f"'{plain}" if text.startswith(_FORMULA) or plain.startswith(_FORMULA) else plain


def markdown_text(text: str) -> str:
    """Return the text without HTML, links and line breaks, for a cell or a heading."""
    plain = " ".join(without_controls(text).split())
    for one, other in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("](", "]\\("), ("`", "\\`")):
        plain = plain.replace(one, other)
    return plain
