"""The notebook of widths chosen per token in a real JupyterLab: target, click, threshold moved and dragged, run.

The model is a tiny random one saved as safetensors, so that a whole turn takes seconds; everything else is real.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_dynamic_precision.ipynb"
PATIENCE_MS = 180_000  # for a whole measured run on a busy machine

PARAMETERS = """
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.view.precision_loop import PrecisionSettings

MODEL = {model!r}
TARGET = 3.5
SETTINGS = PrecisionSettings(
    nested=NestedConfig(widths=(2, 3, 5), group_size=16, fit="rounded"),
    dynamic=PrecisionConfig(targets=(2.5, 4.0), learning_steps=2, projection_rows=4, calibration_tokens=1024),
    prompts=("<b>one</b> two", "three four five"),
    new_tokens=24,
    n_windows=2,
    window_length=24,
    pairs=1,
)
"""


@pytest.fixture
def lab_url(tiny_folder: Path, open_lab: Callable[[Path, str], str]) -> str:
    return open_lab(NOTEBOOK, PARAMETERS.format(model=str(tiny_folder)))


def part(page: Page, name: str) -> Locator:
    """The one element of the workbench with this class."""
    return page.locator(f".wb-workbench .{name}")


def number(page: Page, name: str, pattern: str) -> float:
    text = part(page, name).inner_text()
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def settled(page: Page) -> None:
    """Wait until every key that was pressed has been answered: the numbers have stood still for a second."""
    before = ""
    while (now := part(page, "wb-share").inner_text() + part(page, "wb-expected").inner_text()) != before:
        before = now
        page.wait_for_timeout(1000)


def threshold(page: Page) -> float:
    return number(page, "wb-share", r"Threshold ([\d.e+-]+)")


def share(page: Page) -> float:
    return number(page, "wb-share", r"([\d.]+) % of calibration tokens")


def expected_bits(page: Page) -> float:
    return number(page, "wb-expected", r"([\d.]+) bits expected")


def test_look_move_drag_and_run(
    page: Page,
    lab_url: str,
    run_all: Callable[..., None],
    nothing_amiss: Callable[[], None],
    screenshot: Callable[[str], Path],
) -> None:
    run_all(lab_url, height=4600)

    # Look: it starts by itself. The cell below the widget lowers the target by a quarter of a bit.
    expect(part(page, "wb-expected")).to_contain_text("for the 3.25 asked", timeout=PATIENCE_MS)
    expect(part(page, "wb-expected")).to_contain_text("The map shows what was read at 3.5 bits")
    for name in ("wb-heatmap", "wb-distribution", "wb-steps", "wb-autocorrelation", "wb-tokens"):
        expect(part(page, name).locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=30_000)
    drawn = part(page, "wb-heatmap").locator(".main-svg").first.bounding_box()
    cell = part(page, "wb-heatmap").bounding_box()
    assert drawn is not None
    assert cell is not None
    assert drawn["width"] == pytest.approx(cell["width"], abs=30)
    page.wait_for_timeout(500)
    screenshot("precision-1-look")

    # Pick: thresholds follow the target.
    before, cut = expected_bits(page), threshold(page)
    handle = part(page, "wb-target").locator(".noUi-handle")
    handle.focus()
    for _ in range(5):
        handle.press("ArrowRight")
    expect(part(page, "wb-expected")).to_contain_text("for the 3.50 asked", timeout=30_000)
    expect(part(page, "wb-expected")).not_to_contain_text("The map shows")
    assert expected_bits(page) > before
    assert threshold(page) < cut

    # A click on the map's last row picks the last unit.
    plot = part(page, "wb-heatmap").locator(".nsewdrag").first
    box = plot.bounding_box()
    assert box is not None
    unit = part(page, "wb-unit").locator("select")
    expect(unit.locator("option:checked")).to_have_text("blocks.0.qkv")
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] - 4)
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] - 4)
    expect(unit.locator("option:checked")).to_have_text("blocks.2.down", timeout=15_000)
    expect(part(page, "wb-distribution")).to_contain_text("blocks.2.down")

    # Every number can be mapped.
    for value in ("estimated error", "exact error", "estimated over exact", "width read"):
        part(page, "wb-value").locator("select").select_option(label=value)
        expect(part(page, "wb-heatmap").locator(".gtitle")).to_contain_text(value.capitalize(), timeout=15_000)

    # The slider moves the threshold: more or fewer tokens are expected to read wider.
    unit.select_option(label="blocks.2.o")
    part(page, "wb-low").locator("select").select_option(label="3 bits")
    expect(part(page, "wb-distribution")).to_contain_text("blocks.2.o: tokens above a threshold, step from 3 bits")
    expect(part(page, "wb-share")).to_contain_text("more than 3 bits")
    cut, wide, bits = threshold(page), share(page), expected_bits(page)
    handle = part(page, "wb-threshold").locator(".noUi-handle")
    handle.focus()
    for _ in range(15):
        handle.press("ArrowRight")
    expect(part(page, "wb-share")).to_contain_text("moved by you", timeout=15_000)
    expect(part(page, "wb-expected")).to_contain_text("1 moved by you")
    settled(page)
    assert threshold(page) > cut
    assert share(page) < wide
    assert expected_bits(page) < bits

    # So does dragging its line.
    cut, bits = threshold(page), expected_bits(page)
    line = part(page, "wb-distribution").locator(".shapelayer path").first
    box = line.bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(box["x"] - 20, y, steps=4)
    page.mouse.move(box["x"] - 120, y, steps=8)
    page.mouse.up()
    settled(page)
    screenshot("precision-2-dragged")
    assert threshold(page) < cut
    assert expected_bits(page) > bits
    part(page, "wb-reset").click()
    expect(part(page, "wb-share")).not_to_contain_text("moved by you", timeout=15_000)

    # Run: measured numbers beside the rivals, and the texts.
    part(page, "wb-run").click()
    expect(part(page, "wb-measured").locator("table")).to_be_visible(timeout=PATIENCE_MS)
    rows = part(page, "wb-measured").locator("tbody tr")
    names = ["dense", "3 bits", "5 bits", "static mix", "per token", "per token, held"]
    expect(rows.locator("th")).to_have_text(names)
    assert re.search(r"Quality: \d+ tokens in 2 windows", part(page, "wb-measured").inner_text())
    expect(part(page, "wb-texts").locator(".wb-reply")).to_have_count(4)
    expect(part(page, "wb-texts").locator(".wb-prompt").first).to_have_text("<b>one</b> two")
    page.wait_for_timeout(500)
    screenshot("precision-3-measured")

    # The other rule: what was looked at goes, and comes again by it.
    part(page, "wb-rule").locator("select").select_option(label="error: DP-LLM")
    part(page, "wb-analyse").click()
    expect(part(page, "wb-heatmap").locator(".gsubtitle, .gtitle-subtitle").first).to_contain_text(
        "rule error", timeout=PATIENCE_MS
    )
    screenshot("precision-4-error")

    nothing_amiss()
