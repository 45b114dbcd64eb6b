"""What would keep LaTeX from setting a file of tables, found by reading it: no TeX is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator

COMMANDS = {"begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule", "cmidrule", "multicolumn"}
COMMANDS |= {"textbf", "underline", "scriptsize", "emph", "pm", "textasciitilde", "textbackslash", "usepackage"}
_ESCAPED = re.compile(r"\\[&%$#_{},]|\\\^\{\}")


def problems(text: str) -> list[str]:
    """Unknown commands, environments and braces that are not closed, special characters, and rows of other widths."""
    return list(_problems([line for line in text.splitlines() if not line.startswith("%")]))


def _problems(lines: list[str]) -> Iterator[str]:
    opened: list[str] = []
    columns = 0
    for line in lines:
        plain = _ESCAPED.sub("x", line.replace(r"\\", "\n"))
        yield from (f"unknown command: {name}" for name in re.findall(r"\\(\w+)", plain) if name not in COMMANDS)
        for kind, name in re.findall(r"\\(begin|end)\{([\w*]+)\}", plain):
            if kind == "begin":
                opened.append(name)
            elif not opened or opened.pop() != name:
                yield f"closed, but not open: {name}"
        if plain.count("{") != plain.count("}"):
            yield f"braces: {line}"
        if plain.count("$") % 2:
            yield f"dollar signs: {line}"
        without_maths = re.sub(r"\$[^$]*\$", "x", plain)
        if found := re.search(r"[#%^_~]", without_maths):
            yield f"{found[0]} is not escaped: {line}"
        if spec := re.search(r"\\begin\{tabular\}\{(\w+)\}", plain):
            columns = len(spec[1])
        elif "\n" in plain and _width(plain) != columns:
            yield f"{_width(plain)} columns of {columns}: {line}"
        elif "&" in plain and "\n" not in plain:
            yield f"a row without an end: {line}"
    yield from (f"not closed: {name}" for name in opened)


def _width(row: str) -> int:
    wide = [int(number) - 1 for number in re.findall(r"\\multicolumn\{(\d+)\}", row)]
    return 1 + row.count("&") + sum(wide)
