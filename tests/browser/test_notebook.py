"""The sensitivity notebook in a real JupyterLab, driven as a user would: budget, click, pin, run, cancel, run again.

The model is a tiny random one saved as safetensors, so that a whole turn takes seconds; everything else is real.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_sensitivity.ipynb"
PATIENCE_MS = 180_000  # for a whole measured run on a busy machine

# What JupyterLab itself writes to the console as errors, without anything being wrong.
BENIGN: tuple[str, ...] = ()


@pytest.fixture
def lab_url(tiny_folder: Path, open_lab: Callable[[Path, str], str]) -> str:
    """A JupyterLab with the notebook open, on a tiny model."""
    return open_lab(NOTEBOOK, f"MODEL = {str(tiny_folder)!r}\nBUDGET = 4.5")


def part(page: Page, name: str) -> Locator:
    """The one element of the workbench with this class."""
    return page.locator(f".wb-workbench .{name}")


def predicted(page: Page) -> tuple[float, float, float]:
    """Achieved bits, bits asked for, and predicted damage, as the widget shows them."""
    text = part(page, "wb-predicted").inner_text()
    found = re.search(r"([\d.]+) effective bits for the ([\d.]+) asked, predicted damage ([\d.e+-]+)", text)
    assert found, text
    return float(found[1]), float(found[2]), float(found[3])


def test_look_pick_run_cancel_and_run_again(
    page: Page,
    lab_url: str,
    console_errors: list[str],
    requested_urls: list[str],
    run_all: Callable[..., None],
    screenshot: Callable[[str], Path],
) -> None:
    run_all(lab_url, height=3000)

    # Look: the analysis starts by itself; solved for the budget of the parameters.
    expect(part(page, "wb-predicted")).to_contain_text("effective bits for the 4.50 asked", timeout=PATIENCE_MS)
    expect(part(page, "wb-heatmap").locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=30_000)
    expect(part(page, "wb-linears").locator("tbody tr")).to_have_count(21)
    drawn = part(page, "wb-heatmap").locator(".main-svg").first.bounding_box()
    cell = part(page, "wb-heatmap").bounding_box()
    assert drawn is not None
    assert cell is not None
    assert drawn["width"] == pytest.approx(cell["width"], abs=30)
    expect(part(page, "wb-grid").locator(".js-plotly-plot")).to_be_visible(timeout=30_000)
    screenshot("notebook-1-look")

    # Pick: the prediction follows the slider, and stays within what was asked.
    achieved, asked, damage = predicted(page)
    assert achieved <= asked == 4.5
    handle = part(page, "wb-budget").locator(".noUi-handle")
    handle.focus()
    for _ in range(10):
        handle.press("ArrowLeft")
    expect(part(page, "wb-predicted")).to_contain_text("for the 4.00 asked", timeout=30_000)
    lower, lower_asked, lower_damage = predicted(page)
    assert lower <= lower_asked == 4.0
    assert lower_damage > damage

    # A click on the map's last row chooses the unit of the last linear; pinning it shows in the prediction.
    plot = part(page, "wb-heatmap").locator(".nsewdrag").first
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] - 4)
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] - 4)
    unit = part(page, "wb-unit").locator("select")
    pin = part(page, "wb-unit-bits").locator("select")
    expect(unit.locator("option:checked")).to_have_text("blocks.0.qkv")
    expect(pin.locator("option:checked")).to_have_text("the solver decides")
    expect(part(page, "wb-sequence").locator("option:checked")).to_have_text("all")
    expect(unit.locator("option:checked")).to_have_text("blocks.2.down", timeout=15_000)
    pin.select_option(label="8 bits")
    expect(part(page, "wb-predicted")).to_contain_text("1 of 12 units pinned", timeout=15_000)
    screenshot("notebook-2-picked")

    # Run and cancel: the work stops, nothing is measured, and the widget is ready again.
    run, cancel = part(page, "wb-run"), part(page, "wb-cancel")
    run.click()
    expect(cancel).to_be_enabled(timeout=15_000)
    expect(run).to_be_disabled()
    expect(part(page, "wb-remaining")).not_to_be_empty(timeout=30_000)
    screenshot("notebook-3-running")
    cancel.click()
    expect(part(page, "wb-status")).to_contain_text("Cancelled", timeout=60_000)
    expect(part(page, "wb-measured").locator("table")).to_have_count(0)
    expect(run).to_be_enabled()

    # Run again: measured numbers, dense beside compressed, and the texts.
    run.click()
    expect(part(page, "wb-measured").locator("table")).to_be_visible(timeout=PATIENCE_MS)
    measured = part(page, "wb-measured").inner_text()
    assert re.search(r"time per token, median\s+[\d.]+ ms\s+[\d.]+ ms", measured)
    assert re.search(r"KL to dense, nats per token\s+0\s+0\.\d+ \(95 % interval 0\.\d+ to 0\.\d+\)", measured)
    assert re.search(r"weights on disk\s+156 kB\s+[\d.]+ kB", measured)
    assert re.search(r"(Faster|Slower) than dense|No difference to dense shown", measured)
    effective = re.search(r"effective bits of the units\s+16\s+([\d.]+)", measured)
    assert effective
    assert float(effective[1]) == pytest.approx(predicted(page)[0], abs=1e-3)
    expect(part(page, "wb-texts").locator(".wb-reply")).to_have_count(4)
    expect(part(page, "wb-latency").locator(".js-plotly-plot")).to_be_visible(timeout=30_000)
    page.wait_for_timeout(500)
    screenshot("notebook-4-measured")

    # The cells below ran too, and agree with what the notebook's author saw.
    expect(page.locator(".jp-OutputArea-executeResult").get_by_text("(True, True)")).to_be_visible(timeout=30_000)
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0

    unexpected = [error for error in console_errors if not any(known in error for known in BENIGN)]
    assert unexpected == []
    away = [url for url in requested_urls if not re.match(r"(https?|ws)://127\.0\.0\.1[:/]|data:|blob:", url)]
    assert away == []
