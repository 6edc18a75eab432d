"""The notebooks of outliers in a real JupyterLab: unit and steps, a protection or groups picked, values zeroed, a run.

The model is a tiny random one saved as safetensors, so that a whole turn takes seconds; everything else is real.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.browser

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PATIENCE_MS = 180_000  # for a whole measured run on a busy machine

PARAMETERS = """
from workbench.view.outliers_picks import OutlierSettings

MODEL = {model!r}
UNIT = "blocks.1.qkv"
SETTINGS = OutlierSettings(
    look_windows=2,
    look_length=80,
    surface_tokens=24,
    calibration_tokens=512,
    n_windows=2,
    window_length=24,
    pairs=1,
)
"""


@pytest.fixture
def open_notebook(
    page: Page,
    tiny_folder: Path,
    open_lab: Callable[[Path, str], str],
    run_all: Callable[..., None],
    nothing_amiss: Callable[[], None],
) -> Iterator[Callable[[str], None]]:
    """Open a notebook, run all its cells, wait for the analysis; afterwards, nothing went wrong or left the machine."""

    def opened(name: str) -> None:
        url = open_lab(NOTEBOOKS / name, PARAMETERS.format(model=str(tiny_folder)))
        run_all(url, height=5200)
        for picture in ("wb-profile", "wb-scatter", "wb-surface", "wb-errors"):
            expect(part(page, picture).locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=PATIENCE_MS)

    yield opened
    nothing_amiss()


def part(page: Page, name: str) -> Locator:
    """The one element of the workbench with this class."""
    return page.locator(f".wb-workbench .{name}")


def predicted(page: Page, pattern: str = r"predicted error ([\d.e+-]+)") -> float:
    text = part(page, "wb-predicted").inner_text()
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def choose(page: Page, name: str, label: str) -> None:
    part(page, name).locator("select").select_option(label=label)


def press(page: Page, name: str, key: str, times: int = 1) -> None:
    handle = part(page, name).locator(".noUi-handle")
    handle.focus()
    for _ in range(times):
        handle.press(key)


def test_look_protect_zero_and_run(
    page: Page, open_notebook: Callable[[str], None], screenshot: Callable[[str], Path]
) -> None:
    open_notebook("03_outliers_awq.ipynb")
    # The last cell keeps one percent of the channels, at 4 bits.
    expect(part(page, "wb-predicted")).to_contain_text("1 of 48 channels kept", timeout=PATIENCE_MS)
    expect(part(page, "wb-predicted")).to_contain_text("all 12 units, added up", timeout=PATIENCE_MS)
    expect(part(page, "wb-interventions").locator("tbody tr").first).to_be_visible(timeout=PATIENCE_MS)
    page.wait_for_timeout(1000)
    screenshot("outliers-1-look")

    # Another unit, another range of steps.
    choose(page, "wb-unit", "blocks.2.down")
    for picture in ("wb-profile", "wb-scatter", "wb-surface"):
        expect(part(page, picture).locator(".gtitle")).to_contain_text("blocks.2.down", timeout=30_000)
    choose(page, "wb-range", "first token")
    expect(part(page, "wb-profile")).to_contain_text("4 tokens seen, of 320 tokens", timeout=15_000)
    choose(page, "wb-range", "all")
    choose(page, "wb-order", "by number")
    expect(part(page, "wb-profile").locator(".xtitle")).to_have_text("channel", timeout=15_000)
    press(page, "wb-drawn", "ArrowRight", 2)
    expect(part(page, "wb-profile")).to_contain_text("group 6", timeout=15_000)
    expect(part(page, "wb-massive")).to_contain_text("over the median of its token")

    # Predictions follow the controls: fewer bits, nothing kept, an exponent.
    before = predicted(page)
    choose(page, "wb-bits", "3")
    expect(part(page, "wb-errors")).to_contain_text("awq, 1 % kept, 3 bits", timeout=30_000)
    assert predicted(page) > before
    before = predicted(page)
    press(page, "wb-share", "Home")
    expect(part(page, "wb-predicted")).not_to_contain_text("kept", timeout=15_000)
    assert predicted(page) > before
    press(page, "wb-alpha", "ArrowRight", 8)
    expect(part(page, "wb-predicted")).to_contain_text("exponent 0.40", timeout=15_000)
    expect(part(page, "wb-surface")).to_contain_text("exponent 0.40", timeout=15_000)
    part(page, "wb-clip").locator("input").check()

    # Run: beside dense and plain rounding.
    part(page, "wb-run").click()
    expect(part(page, "wb-measured").locator("table")).to_be_visible(timeout=PATIENCE_MS)
    rows = part(page, "wb-measured").locator("tbody tr th")
    expect(rows).to_have_text(["dense", "rtn, 3 bits", "awq, 3 bits"])
    assert re.search(r"Quality: \d+ tokens in 2 windows", part(page, "wb-measured").inner_text())
    part(page, "wb-zero").click()
    expect(part(page, "wb-interventions")).to_contain_text("blocks.2.down", timeout=PATIENCE_MS)
    page.wait_for_timeout(1000)
    screenshot("outliers-2-measured")


def test_groups_and_run(page: Page, open_notebook: Callable[[str], None], screenshot: Callable[[str], Path]) -> None:
    open_notebook("04_outliers_tender.ipynb")
    expect(part(page, "wb-predicted")).to_contain_text("all 12 units, added up", timeout=PATIENCE_MS)
    expect(part(page, "wb-by-groups").locator(".main-svg").first).to_be_visible(timeout=30_000)
    page.wait_for_timeout(500)

    before = predicted(page)
    choose(page, "wb-bits", "4")
    expect(part(page, "wb-by-groups")).to_contain_text("4 bits", timeout=15_000)
    assert predicted(page) > before
    choose(page, "wb-bits", "8")
    choose(page, "wb-groups", "2")
    expect(part(page, "wb-predicted")).to_contain_text("; 2 groups", timeout=15_000)
    expect(part(page, "wb-surface")).to_contain_text("divided by the scales of 2 groups", timeout=15_000)
    choose(page, "wb-scales", "calibrated by chunk")
    expect(part(page, "wb-by-groups")).to_contain_text("scales by chunk", timeout=15_000)
    # The last cell makes the compressed model; the table of the simulation follows it.
    expect(page.get_by_text("simulated_slowdown").last).to_be_visible(timeout=PATIENCE_MS)
    expect(part(page, "wb-run")).to_be_enabled(timeout=PATIENCE_MS)
    part(page, "wb-run").click()
    expect(part(page, "wb-measured").locator("table")).to_be_visible(timeout=PATIENCE_MS)
    rows = part(page, "wb-measured").locator("tbody tr th")
    expect(rows).to_have_text(["dense", "integers per token, 8 bits", "tender, 8 bits"])
    page.wait_for_timeout(1000)
    screenshot("outliers-3-groups")
