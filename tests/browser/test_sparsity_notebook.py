"""The notebook of contextual sparsity in a real JupyterLab: masks beside what mattered, picks, steps, a run.

The model is a tiny random one saved as safetensors, so that a whole turn takes seconds; everything else is real.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "05_sparsity.ipynb"
PATIENCE_MS = 240_000  # for a fit, or a whole measured run, on a busy machine

PARAMETERS = """
from workbench.apply.input_sparsity_config import InputSparsityConfig
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.view.sparsity_picks import SparsityPick, SparsitySettings

MODEL = {model!r}
PICK = SparsityPick("predicted", 0.2)
SETTINGS = SparsitySettings(
    weights=RtnConfig(bits=16, group_size=48, output_bits=16),
    masks=PredictedSparsityConfig(
        width=16,
        prefix=16,
        epochs=2,
        decisions_per_text=24,
        calibration_tokens=1024,
        aggregates=("plainact", "magnitude"),
    ),
    inputs=InputSparsityConfig(allocation="uniform", calibration_tokens=1024),
    prompts=("<b>one</b> two", "three four five"),
    new_tokens=24,
    curve=(0.1, 0.4),
    curve_windows=2,
    curve_length=72,
    by_domain=(0.1, 0.3),
    quality_windows=2,
    quality_length=32,
    n_windows=4,
    window_length=72,
    pairs=1,
)
"""


def part(page: Page, name: str) -> Locator:
    """The one element of the workbench with this class."""
    return page.locator(f".wb-workbench .{name}")


def damage(page: Page) -> float:
    text = part(page, "wb-predicted").inner_text()
    found = re.search(r"predicted damage ([\d.e+-]+)", text)
    assert found, text
    return float(found[1])


def choose(page: Page, name: str, label: str) -> None:
    part(page, name).locator("select").select_option(label=label)


def press(page: Page, name: str, key: str, times: int = 1) -> None:
    handle = part(page, name).locator(".noUi-handle")
    handle.focus()
    for _ in range(times):
        handle.press(key)


def test_look_pick_and_run(
    page: Page,
    tiny_folder: Path,
    open_lab: Callable[[Path, str], str],
    run_all: Callable[..., None],
    nothing_amiss: Callable[[], None],
    screenshot: Callable[[str], Path],
) -> None:
    url = open_lab(NOTEBOOK, PARAMETERS.format(model=str(tiny_folder)))
    run_all(url, height=5200)

    # The last cell leaves out ten points more than the parameters say.
    expect(part(page, "wb-predicted")).to_contain_text("30% left out", timeout=PATIENCE_MS)
    for picture in ("wb-curves", "wb-map", "wb-steps", "wb-quality"):
        expect(part(page, picture).locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=60_000)
    expect(part(page, "wb-counts").locator("tbody tr th").first).to_have_text("predicted masks")
    expect(part(page, "wb-verdict")).to_contain_text("static mask")
    expect(part(page, "wb-map").locator(".gtitle")).to_contain_text("Heads over")
    page.wait_for_timeout(1000)
    screenshot("sparsity-1-look")

    # Predictions and masks follow the controls.
    before = damage(page)
    press(page, "wb-sparsity", "ArrowRight", 2)
    expect(part(page, "wb-predicted")).to_contain_text("40% left out", timeout=60_000)
    assert damage(page) > before
    press(page, "wb-sparsity", "End")  # more than this model has blocks for: said, and the slider goes back
    expect(part(page, "wb-status")).to_contain_text("is not possible here", timeout=60_000)
    expect(part(page, "wb-sparsity").locator(".widget-readout")).to_have_text("40%")
    choose(page, "wb-criterion", "magnitude")
    expect(part(page, "wb-map")).to_contain_text("true scores by magnitude", timeout=60_000)
    choose(page, "wb-kind", "neurons")
    expect(part(page, "wb-map").locator(".gtitle")).to_contain_text("Neurons over", timeout=60_000)
    expect(part(page, "wb-steps").locator(".gtitle")).to_contain_text("Neurons of block", timeout=60_000)
    screenshot("sparsity-2-neurons")
    choose(page, "wb-kind", "heads")
    press(page, "wb-step", "ArrowRight", 3)
    expect(part(page, "wb-map").locator(".gtitle")).to_contain_text("Heads at step", timeout=60_000)
    choose(page, "wb-block", "1")
    expect(part(page, "wb-steps").locator(".gtitle")).to_contain_text("Heads of block 1", timeout=60_000)
    choose(page, "wb-text", "1")
    expect(part(page, "wb-map")).to_contain_text("text 1", timeout=60_000)
    choose(page, "wb-scope", "once a reply")
    expect(part(page, "wb-predicted")).to_contain_text("masks, once a reply", timeout=60_000)
    choose(page, "wb-method", "inputs by size (TEAL)")
    expect(part(page, "wb-map").locator(".gtitle")).to_contain_text("Share of its inputs", timeout=60_000)
    choose(page, "wb-method", "predicted masks")
    expect(part(page, "wb-predicted")).to_contain_text("predicted masks, once a reply", timeout=60_000)
    choose(page, "wb-scope", "every token")
    expect(part(page, "wb-predicted")).to_contain_text("predicted masks, 40% left out", timeout=60_000)

    # Run: beside the weights whole and the rivals, by domain and language, and the texts side by side.
    part(page, "wb-run").click()
    expect(part(page, "wb-measured").locator("table")).to_be_visible(timeout=PATIENCE_MS)
    rows = part(page, "wb-measured").locator("tbody tr th")
    expect(rows).to_have_text(
        [
            "whole",
            "static mask by magnitude",
            "random mask",
            "true masks: not causal",
            "inputs by size (TEAL)",
            "inputs by size and weights (WINA)",
            "predicted masks",
        ]
    )
    assert re.search(r"Quality: \d+ tokens in 4 windows", part(page, "wb-measured").inner_text())
    expect(part(page, "wb-batches").locator(".gtitle")).to_contain_text("several requests at once", timeout=60_000)
    expect(part(page, "wb-groups").locator(".gtitle")).to_contain_text("each field and language", timeout=60_000)
    expect(part(page, "wb-curves")).to_contain_text("measured: predicted masks", timeout=60_000)
    expect(part(page, "wb-texts").locator(".wb-prompt").first).to_have_text("<b>one</b> two")
    page.wait_for_timeout(1000)
    screenshot("sparsity-3-measured")

    nothing_amiss()
