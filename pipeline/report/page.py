"""A report as one HTML file that needs nothing else: pictures inside, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

from pipeline.report.build import Report
from pipeline.report.exhibit import Columns, Exhibit

MAX_SHOWN = 30
"""Rows of a table that are shown; its file has all."""
STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #aaa; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 0.3rem; }
p { margin: 0.3rem 0; } .soft { color: var(--soft); } img { max-width: 100%; border-radius: 4px; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.5rem 0; }
td, th { border-bottom: 1px solid var(--line); padding: 0.2rem 0.7rem 0.2rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { white-space: nowrap; }
summary { cursor: pointer; color: var(--soft); } pre { white-space: pre-wrap; }
"""


def html(title: str, facts: Mapping[str, str], report: Report) -> str:
    """The page: what the run is, then its pictures and tables."""
    head = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts.items()
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    body = "\n".join(_section(one) for one in report.exhibits)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><table>{head}</table>{notes}\n{body}\n</body></html>\n"
    )


def _section(exhibit: Exhibit) -> str:
    title, caption = escape(exhibit.title), escape(exhibit.caption)
    table = _table(exhibit.table)
    if exhibit.png is not None:
        picture = base64.b64encode(exhibit.png).decode()
        image = f'<img alt="{title}" src="data:image/png;base64,{picture}">'
        table = f"{image}<details><summary>numbers</summary>{table}</details>"
    return f'<h2>{title}</h2><p class="soft">{caption}</p>{table}'


def _table(columns: Columns) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = list(zip(*columns.values(), strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>"
        for row in rows[:MAX_SHOWN]
    )
    more = f"<p class='soft'>{len(rows):,} rows in all</p>" if len(rows) > MAX_SHOWN else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"
