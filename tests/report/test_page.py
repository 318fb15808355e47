"""A report as one file: nothing outside of it is needed, and nothing in it is taken for markup."""

from __future__ import annotations

import re

from pipeline.report.build import Report
from pipeline.report.exhibit import Exhibit
from pipeline.report.page import MAX_SHOWN, html

EVIL = '<script>alert(1)</script>&"'


def test_it_needs_nothing_else_and_escapes_what_it_shows() -> None:
    table = {EVIL: [EVIL] * (MAX_SHOWN + 5)}
    exhibits = [Exhibit("a", EVIL, EVIL, table, b"png"), Exhibit("b", "B", "", table)]
    page = html(EVIL, {EVIL: EVIL}, Report(exhibits, [EVIL]))
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("<h2>") == 2
    assert f"{MAX_SHOWN + 5} rows in all" in page
    assert "prefers-color-scheme: dark" in page
