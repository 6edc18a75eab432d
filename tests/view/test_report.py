"""A report is one file, complete, safe to open, and written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from workbench.analysis.profile import Profile
from workbench.errors import InputError, StoreError
from workbench.view import plots
from workbench.view.report import ReportFigure, write_report
from workbench.view.texts import Generation

NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """Collects start tags with their attributes, and the text of each script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


@pytest.fixture
def full_report(tmp_path: Path, steps_profile: Callable[..., Profile]) -> Path:
    """A report with every section, with hostile text wherever text can come from a user or a file."""
    profile = steps_profile(suffix=NASTY, model=NASTY)
    grid = plots.step_grid(profile, 4)
    return write_report(
        tmp_path / "report.html",
        title=f"Report of {NASTY}",
        summary=NASTY,
        recipe={"model": NASTY, "methods": [{"method": "rtn", "bits": 4}]},
        environment={"cpu": NASTY, "versions": {"torch": "2"}},
        measurements=[
            {"variant": "dense", "ms_per_token": 10.0, "weight_bytes": 269_030_016},
            {"variant": NASTY, "ms_per_token": 12.0, "weight_bytes": 90_000_000, "kl_mean": None},
        ],
        figures=[ReportFigure(plots.step_heatmap(profile, 4), f"Errors of {NASTY}", grid.table)],
        tables={f"Ranking {NASTY}": pd.DataFrame({"linear": [NASTY], "relative_error": [0.25]})},
        generations=[Generation(NASTY, ("Hello", " <b>", "world"), ("Hello", " there", "world"))],
        profiles={"steps": profile},
    )


def test_hostile_text_makes_no_elements(full_report: Path) -> None:
    parser = Elements()
    parser.feed(full_report.read_text(encoding="utf-8"))
    names = [tag for tag, _ in parser.tags]
    assert "img" not in names
    assert "b" not in names
    assert len(parser.scripts) == 3  # the figure's data, plotly, and what draws
    assert not any(name.startswith("on") for _, attributes in parser.tags for name in attributes)
    figure = json.loads(parser.scripts[0])
    assert figure["data"][0]["type"] == "heatmap"
    assert "<script" not in parser.scripts[0]


def test_nothing_is_loaded_from_elsewhere(full_report: Path) -> None:
    parser = Elements()
    parser.feed(full_report.read_text(encoding="utf-8"))
    links = [a.get(k) for _, a in parser.tags for k in ("src", "href", "srcset", "data") if k in a]
    assert all(link is not None and link.startswith("#") for link in links)
    policy = next(a["content"] for t, a in parser.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_it_holds_recipe_numbers_texts_and_how_they_were_measured(full_report: Path) -> None:
    text = full_report.read_text(encoding="utf-8")
    body = text[: text.index("plotly.js v")] if "plotly.js v" in text else text
    assert "&#34;method&#34;: &#34;rtn&#34;" in body
    assert "269\u202f030\u202f016" in body
    assert re.search(r"Hello<mark> &lt;b&gt;</mark>world", body)
    assert re.search(r"Hello<mark> there</mark>world", body)
    assert "pinned threads" in body  # how ms_per_token was measured
    assert "perplexity</code>" not in body  # not measured, so not explained


def test_every_table_has_a_caption_and_can_be_reached_by_keyboard(full_report: Path) -> None:
    parser = Elements()
    parser.feed(full_report.read_text(encoding="utf-8"))
    names = [tag for tag, _ in parser.tags]
    assert names.count("table") == names.count("caption") >= 4
    regions = [a for t, a in parser.tags if t == "div" and a.get("role") == "region"]
    assert len(regions) == names.count("table")
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in regions)


def test_long_tables_say_that_they_are_cut(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", title="t", tables={"long": pd.DataFrame({"x": range(1200)})})
    assert "the first 500 of 1200 rows" in path.read_text(encoding="utf-8")


def test_without_figures_plotly_is_left_out(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", title="t", recipe={})
    assert path.stat().st_size < 50_000


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path / "r.html", title="first")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(StoreError, match="disk is full"):
        write_report(path, title="second")
    assert "first" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        write_report(tmp_path / "nowhere" / "r.html", title="t")
