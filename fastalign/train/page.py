"""The parts that HTML pages are made of: one template, sections, tables and figures, with everything foreign escaped."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


def section(title: str, body: str, css: str = "") -> str:
    return f"<section><h2>{title}</h2><div{f' class={css}' if css else ''}>{body}</div></section>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False, wide: bool = False) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    css = " ".join(name for name, on in (("numbers", numbers), ("wide", wide)) if on)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(title: str, png: bytes, note: str, alt: str) -> str:
    """A captioned image that is part of the page itself."""
    image = f'<img src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}" alt="{alt}" loading="lazy">'
    return f"<figure><h3>{title}</h3>{image}<figcaption>{note}</figcaption></figure>"


def text_of(value: Any) -> str:
    """A metric or option as a reader wants it: four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:,.0f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def escape(text: str) -> str:
    # Control characters have no meaning in HTML and some of them are forbidden in it.
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text))


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · fastalign</title>
<style>
:root {{ --ink: #1c2430; --soft: #5c6673; --line: #e1e5ea; --page: #f6f7f9; --card: #ffffff; color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e7eaee; --soft: #9aa4b1; --line: #2f3742; --page: #14181d; --card: #1c2229; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h1 {{ margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }}
h2 {{ margin: 2.4rem 0 .8rem; font-size: 1.15rem; }}
h3 {{ margin: 0 0 .5rem; font-size: 1rem; }}
header p, figcaption, .note {{ color: var(--soft); margin: .25rem 0 0; overflow-wrap: anywhere; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: .75rem; margin-top: 1.5rem; }}
.tiles div {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }}
.tiles b {{ display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }}
.tiles span {{ color: var(--soft); font-size: .85rem; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 1rem; }}
figure {{ margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; break-inside: avoid; }}
figure img {{ width: 100%; height: auto; display: block; background: #fff; border-radius: 6px; }}
figcaption {{ font-size: .85rem; margin-top: .5rem; }}
.scroll {{ overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
th, td {{ text-align: left; padding: .4rem .9rem; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }}
th {{ color: var(--soft); font-weight: 600; }}
tbody tr:last-child td {{ border-bottom: 0; }}
.numbers td:not(:first-child), .numbers th:not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums; }}
.wide td {{ white-space: pre-wrap; min-width: 11rem; }}
footer {{ margin-top: 3rem; color: var(--soft); font-size: .85rem; }}
@media print {{
  :root {{ --ink: #1c2430; --soft: #5c6673; --line: #e1e5ea; --page: #ffffff; --card: #ffffff; color-scheme: light; }}
  body {{ max-width: none; padding: 0; background: #fff; }}
  .figures {{ grid-template-columns: 1fr 1fr; }} .scroll {{ overflow: visible; }} }}
</style>
</head>
<body>
<header><h1>{title}</h1><p>{intro}</p></header>
{body}
<footer>{footer}</footer>
</body>
</html>
"""
