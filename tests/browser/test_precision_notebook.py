"""The notebook of widths chosen per token in a real JupyterLab: click a unit, drag its threshold, move the target, run.

The model is a tiny random one, so that a whole turn takes seconds; everything else is real.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from workbench.models import LoadedModel

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_dynamic_precision.ipynb"
PATIENCE_MS = 180_000
PARAMETERS = """
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.view.precision_loop import PrecisionSettings

MODEL = {model!r}
TARGET = 3.3
SETTINGS = PrecisionSettings(
    nested=NestedConfig(widths=(2, 3, 5), group_size=16, fit="rounded"),
    dynamic=PrecisionConfig(targets=(), calibration_tokens=1024),
    new_tokens=12,
    n_windows=2,
    window_length=32,
    pairs=2,
)
"""


def part(page: Page, name: str) -> Locator:
    """The one element of the workbench with this class."""
    return page.locator(f".wb-workbench .{name}")


def threshold_and_share(page: Page) -> tuple[float, float]:
    text = part(page, "wb-share").inner_text()
    found = re.search(r"Threshold ([\d.e+-]+).*?: ([\d.]+) % of calibration", text)
    assert found, text
    return float(found[1]), float(found[2])


def expected_bits(page: Page) -> float:
    found = re.match(r"([\d.]+) bits expected", part(page, "wb-expected").inner_text())
    assert found
    return float(found[1])


def test_look_drag_move_the_target_and_run(
    page: Page,
    tmp_path: Path,
    make_model: Callable[..., LoadedModel],
    open_lab: Callable[[Path, str], str],
    console_errors: list[str],
    screenshot: Callable[[str], Path],
) -> None:
    model = make_model()
    model.module.save_pretrained(tmp_path / "tiny-model")
    model.tokenizer.save_pretrained(tmp_path / "tiny-model")
    page.set_viewport_size({"width": 1400, "height": 3400})
    page.goto(open_lab(NOTEBOOK, PARAMETERS.format(model=str(tmp_path / "tiny-model"))))
    expect(page.locator(".jp-Notebook .jp-CodeCell").first).to_be_visible(timeout=60_000)
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells$")).click()

    # Look: what was chosen at every step; the notebook's last cell asked for another target.
    expect(part(page, "wb-expected")).to_contain_text("for the 3.05 asked", timeout=PATIENCE_MS)
    expect(part(page, "wb-heatmap").locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=30_000)
    for picture in ("wb-steps", "wb-distribution", "wb-autocorrelation", "wb-tokens"):
        expect(part(page, picture).locator(".js-plotly-plot").first).to_be_visible(timeout=30_000)
    screenshot("precision-1-look")

    # A click on the map's last row chooses its unit.
    plot = part(page, "wb-heatmap").locator(".nsewdrag").first
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] - 4)
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] - 4)
    unit = part(page, "wb-unit").locator("select")
    expect(unit.locator("option:checked")).to_have_text("blocks.2.down", timeout=15_000)
    expect(part(page, "wb-distribution").locator(".gtitle").first).to_contain_text("blocks.2.down", timeout=15_000)
    for value in ("exact error", "estimated over exact", "estimated error"):
        part(page, "wb-value").get_by_role("radio", name=value, exact=True).or_(
            part(page, "wb-value").get_by_role("button", name=value, exact=True)
        ).first.click()
        expect(part(page, "wb-heatmap").locator(".gtitle").first).to_contain_text(value.capitalize(), timeout=15_000)
    screenshot("precision-2-unit")

    # Dragging the dashed line to the left lets more tokens read wide, and the average rises with it.
    before, share = threshold_and_share(page)
    bits = expected_bits(page)
    line = part(page, "wb-distribution").locator(".shapelayer path").first
    where = line.bounding_box()
    assert where is not None
    x, y = where["x"] + where["width"] / 2, where["y"] + where["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 40, y, steps=8)
    page.mouse.up()
    expect(part(page, "wb-share")).to_contain_text("moved by you", timeout=15_000)
    after, more = threshold_and_share(page)
    assert after < before
    assert more >= share
    assert expected_bits(page) >= bits
    expect(part(page, "wb-expected")).to_contain_text("1 moved by you")
    screenshot("precision-3-dragged")
    part(page, "wb-reset").click()
    expect(part(page, "wb-expected")).not_to_contain_text("moved by you", timeout=15_000)
    assert threshold_and_share(page)[0] == pytest.approx(before, rel=1e-3)

    # The slider of the threshold does the same.
    handle = part(page, "wb-threshold").locator(".noUi-handle")
    handle.focus()
    for _ in range(6):
        handle.press("ArrowRight")
    expect(part(page, "wb-share")).to_contain_text("moved by you", timeout=15_000)
    assert threshold_and_share(page)[0] > before

    # The target: thresholds follow, what was moved by hand is dropped.
    handle = part(page, "wb-target").locator(".noUi-handle")
    handle.focus()
    for _ in range(10):
        handle.press("ArrowRight")
    expect(part(page, "wb-expected")).to_contain_text("for the 3.55 asked", timeout=15_000)
    expect(part(page, "wb-expected")).not_to_contain_text("moved by you")
    assert expected_bits(page) > bits

    # Run: measured beside its rivals.
    part(page, "wb-run").click()
    expect(part(page, "wb-measured").locator("table")).to_be_visible(timeout=PATIENCE_MS)
    rows = part(page, "wb-measured").locator("tbody tr")
    expect(rows).to_have_count(6)
    measured = part(page, "wb-measured").inner_text()
    assert re.search(r"per token, held\s+3\.55\s+\d\.\d+\s+\d\.\d+\s+[\d.]+\s+0\.\d+ \(", measured)
    assert re.search(r"64 tokens in 2 windows|62 tokens in 2 windows", measured)
    expect(part(page, "wb-texts").locator(".wb-reply")).to_have_count(4)
    page.wait_for_timeout(500)
    screenshot("precision-4-measured")
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert console_errors == []
