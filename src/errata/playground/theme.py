"""The look of the playground: the colours and the typography of the report's page, as a theme of Gradio.

colours.css has a light and a dark tone of each colour, and follows the system. So does Gradio.
"""

from __future__ import annotations

from importlib.resources import files
from types import MappingProxyType
from typing import Any

# Gradio's variables, each with the name of a colour in benchmarks/reports/colours.css.
THEME = MappingProxyType(
    {
        "body_background_fill": "ground",
        "body_text_color": "ink",
        "body_text_color_subdued": "muted",
        "background_fill_primary": "panel",
        "background_fill_secondary": "tint",
        "border_color_primary": "line",
        "border_color_accent": "muted",
        "color_accent_soft": "tint",
        "loader_color": "ink",
        "block_background_fill": "panel",
        "block_border_color": "line",
        "block_info_text_color": "muted",
        "block_label_background_fill": "panel",
        "block_label_border_color": "line",
        "block_label_text_color": "muted",
        "block_title_text_color": "muted",
        "input_background_fill": "ground",
        "input_background_fill_focus": "ground",
        "input_border_color": "line",
        "input_border_color_focus": "muted",
        "input_placeholder_color": "muted",
        "button_primary_background_fill": "ink",
        "button_primary_background_fill_hover": "muted",
        "button_primary_border_color": "ink",
        "button_primary_border_color_hover": "muted",
        "button_primary_text_color": "ground",
        "button_primary_text_color_hover": "ground",
        "button_secondary_background_fill": "panel",
        "button_secondary_background_fill_hover": "tint",
        "button_secondary_border_color": "line",
        "button_secondary_border_color_hover": "muted",
        "button_secondary_text_color": "ink",
        "button_secondary_text_color_hover": "ink",
        "checkbox_background_color": "panel",
        "checkbox_background_color_selected": "ink",
        "checkbox_border_color": "muted",
        "checkbox_border_color_selected": "ink",
        "checkbox_label_background_fill": "panel",
        "checkbox_label_background_fill_hover": "tint",
        "checkbox_label_background_fill_selected": "tint",
        "checkbox_label_border_color": "line",
        "checkbox_label_border_color_selected": "muted",
        "checkbox_label_text_color": "ink",
        "checkbox_label_text_color_selected": "ink",
        "table_even_background_fill": "panel",
        "table_odd_background_fill": "panel",
        "table_border_color": "line",
        "table_row_focus": "tint",
        "table_text_color": "ink",
    }
)


def colours() -> str:
    """Return the colours of the report's page, light and dark."""
    return (files("errata.benchmarks.reports") / "colours.css").read_text(encoding="utf-8")


def theme(gradio: Any) -> Any:
    """Return Gradio's theme with the typography and the colours of the report's page."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    default = gradio.themes.Default(font=sans, font_mono=mono, radius_size="sm")
    both = {f"{name}{tone}": f"var(--{colour})" for name, colour in THEME.items() for tone in ("", "_dark")}
    return default.set(color_accent="var(--ink)", button_border_width="1px", button_border_width_dark="1px", **both)
