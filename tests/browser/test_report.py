"""The report opened from disk: its figures draw under its own security policy, and it asks for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Page, expect

from workbench.view.plots import damage_by_unit, pareto
from workbench.view.report import ReportFigure, write_report

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=\"document.title='taken over'\"><script>document.title='taken over'</script>"


@pytest.fixture
def report(tmp_path: Path) -> Path:
    points = pd.DataFrame({"effective_bits": [3.0, 4.0], "damage": [0.4, 0.1], "kind": "solved"})
    bits = {f"blocks.{block}.{kind}": 4.0 for block in range(3) for kind in ("qkv", "o", "gate_up", "down")}
    return write_report(
        tmp_path / "report.html",
        title=f"Report {HOSTILE}",
        figures=[
            ReportFigure(damage_by_unit(None, bits), f"Bits {HOSTILE}"),
            ReportFigure(pareto(points, note=HOSTILE), "Trade-off", points),
        ],
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_draw_and_nothing_runs_or_loads(
    page: Page,
    report: Path,
    scheme: str,
    console_errors: list[str],
    requested_urls: list[str],
    screenshot: Callable[[str], Path],
) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(report.as_uri())
    expect(page.locator(".plot .main-svg").first).to_be_visible()
    expect(page.locator(".plot.js-plotly-plot")).to_have_count(2)
    expect(page.get_by_text("onerror").first).to_be_visible()  # shown as text
    page.get_by_text("The same as a table").press("Enter")
    expect(page.get_by_role("table")).to_be_visible()
    assert page.title().startswith("Report <img")
    assert page.evaluate("getComputedStyle(document.querySelector('.plot .main-svg')).backgroundColor") == (
        "rgb(20, 24, 29)" if scheme == "dark" else "rgb(255, 255, 255)"
    )
    screenshot(f"report-{scheme}")
    assert console_errors == []
    assert [url for url in requested_urls if not url.startswith(("file:", "data:", "blob:"))] == []
