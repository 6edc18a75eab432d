"""The served dashboard in a real Chromium: what a manager reads, and what a stranger is refused."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from workbench.store import Store

pytestmark = pytest.mark.browser

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
SERVE = """
import sys
from pathlib import Path
from workbench.store import Store
from workbench.view import dashboard
dashboard.REFRESH_S = 1
dashboard.serve(Store(Path(sys.argv[1])), port=int(sys.argv[2]), prefix=sys.argv[3])
"""
# Pixels of a run's point inside the picture.
WHERE_DRAWN = """(plot, run) => {
  const {xaxis, yaxis} = plot._fullLayout;
  const point = plot.calcdata.flat().find(each => each.data === run);
  return [xaxis._offset + xaxis.c2p(point.x), yaxis._offset + yaxis.c2p(point.y)];
}"""


def rows(bits: float, delta: float, ratio: float, *, spread: float = 0.002) -> dict[str, dict[str, Any]]:
    """A dense and a compressed row as a measurement writes them."""
    dense = {
        "name": "workbench",
        "method": "bf16",
        "engine": "reference",
        "text": "prose",
        "n_tokens": 49104,
        "output_bits": 16,
        "perplexity": 20.11,
        "ms_per_token": 41.2,
        "ms_p95": 44.0,
        "decode_tokens_per_s": 24.3,
        "weight_bytes": 269_030_016,
        "peak_rss_bytes": 1_130_000_000,
    }
    compressed = dense | {
        "method": "rtn",
        "effective_bits": bits,
        "output_bits": 8.25,
        "perplexity": 20.11 * math.exp(delta),
        "delta_nll": delta,
        "delta_nll_low": delta - spread,
        "delta_nll_high": delta + spread,
        "kl_mean": 1.02 * delta,
        "top1_agreement": 0.871,
        "ms_per_token": 41.2 * ratio,
        "ms_p95": 44.0 * ratio,
        "decode_tokens_per_s": 24.3 / ratio,
        "weight_bytes": int(29_000_000 + 106_000_000 * bits / 8),
        "peak_rss_bytes": 990_000_000,
    }
    return {"dense": dense, "compressed": compressed}


def record(store: Store, name: str, *, bits: float, delta: float, ratio: float, **changes: Any) -> int:
    kinds = ("qkv", "o", "gate_up", "down")
    widths = {f"blocks.{block}.{kind}": 3 + (block + len(kind)) % 4 for block in range(30) for kind in kinds}
    settings: dict[str, Any] = {"model": "smollm2-135m", "method": "rtn"} | changes
    return store.record_run(
        "demo",
        name=name,
        recipe_sha256="5d" * 32,
        summary=rows(bits, delta, ratio)
        | {
            "latency_ratio": ratio,
            "latency_ratio_low": ratio - 0.04,
            "latency_ratio_high": ratio + 0.04,
            "bits_by_unit": widths,
            "notes": [f"Quality rests on 48 windows {HOSTILE}"],
            "recipe": {"schema_version": 1, "seed": 0, "methods": [{"method": "rtn", "unit_bits": widths}]},
        },
        environment={"cpu": "A processor", "cores": 2, "memory_bytes": 16_000_000_000, "python": "3.12.1"},
        **settings,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with four runs: slower, undecided, faster, and one with a hostile name on another model."""
    home = tmp_path_factory.mktemp("home")
    with Store(home) as store:
        record(store, HOSTILE, bits=3.25, delta=0.41, ratio=0.97, model=f"other{HOSTILE}", method=f"rtn{HOSTILE}")
        record(store, "uniform 8 bits", bits=8.25, delta=0.0003, ratio=0.6)
        record(store, "uniform 3 bits", bits=3.25, delta=0.62, ratio=1.01)
        record(store, "solved for 4.5 bits", bits=4.5, delta=0.055, ratio=1.12)
    return home


@pytest.fixture(scope="module")
def dashboard(home: Path, start_server: Callable[..., Any], free_port: Callable[[], int]) -> str:
    """URL of a dashboard of that store."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    start_server([sys.executable, "-c", SERVE, str(home), str(port), ""], url)
    return url


@pytest.fixture(autouse=True)
def nothing_leaves_the_machine(requested_urls: list[str], console_errors: list[str]) -> Iterator[None]:
    """Every test of this module: no error on the console, and no request but to the server itself."""
    yield
    hosts = {urlsplit(url).hostname for url in requested_urls if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts <= {"127.0.0.1"}
    assert console_errors == []


def card(page: Page, title: str) -> Any:
    return page.get_by_role("region", name=title)


def choose(page: Page, name: str) -> None:
    select = page.get_by_label("Run", exact=True)
    option = select.locator("option", has_text=name).get_attribute("value")
    select.select_option(option)


def test_newest_run_is_told_in_plain_words(page: Page, dashboard: str, screenshot: Callable[[str], Path]) -> None:
    page.goto(dashboard)
    expect(card(page, "Latency")).to_contain_text("12 % more time per token than dense")
    expect(card(page, "Latency")).to_contain_text("95 % interval 1.080 to 1.160")
    expect(card(page, "Latency")).to_contain_text("46.14 ms (dense: 41.20 ms)")
    expect(card(page, "Size")).to_contain_text("67 % smaller than dense")
    expect(card(page, "Quality")).to_contain_text("5.7 % higher perplexity than dense")
    expect(page.get_by_text("A processor")).to_be_visible()
    expect(page.locator(".js-plotly-plot .scatterlayer .point").first).to_be_visible()
    screenshot("dashboard")


def test_another_run_changes_every_part(page: Page, dashboard: str, screenshot: Callable[[str], Path]) -> None:
    page.goto(dashboard)
    expect(card(page, "Latency")).to_contain_text("more time per token")
    choose(page, "uniform 3 bits")
    expect(card(page, "Latency")).to_contain_text("No difference from dense beyond the noise")
    expect(card(page, "Quality")).to_contain_text("86 % higher perplexity than dense")
    choose(page, "uniform 8 bits")
    expect(card(page, "Latency")).to_contain_text("40 % less time per token than dense")
    expect(card(page, "Quality")).to_contain_text("No difference from dense beyond the noise")
    expect(page.get_by_role("row", name="uniform 8 bits")).to_have_attribute("aria-current", "true")
    screenshot("dashboard-other-run")


def test_run_is_chosen_in_the_picture(page: Page, dashboard: str) -> None:
    page.goto(dashboard)
    expect(card(page, "Latency")).to_contain_text("more time per token")
    option = page.get_by_label("Run", exact=True).locator("option", has_text="uniform 8 bits").inner_text()
    plot = page.locator(".js-plotly-plot")
    plot.scroll_into_view_if_needed()
    x, y = plot.evaluate(WHERE_DRAWN, int(option.removeprefix("#").split()[0]))
    plot.click(position={"x": x, "y": y})
    expect(page.locator(".run-name")).to_have_text("uniform 8 bits")


def test_models_can_be_told_apart(page: Page, dashboard: str) -> None:
    page.goto(dashboard)
    expect(page.get_by_label("Run", exact=True).locator("option")).to_have_count(4)
    page.get_by_label("Model").select_option("smollm2-135m")
    expect(page.get_by_label("Run", exact=True).locator("option")).to_have_count(3)


def test_picked_recipe_can_be_taken_away(page: Page, dashboard: str) -> None:
    page.goto(dashboard)
    expect(page.get_by_role("rowheader", name="gate_up")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_text("Download recipe").click()
    recipe = json.loads(Path(download.value.path()).read_text())
    assert recipe["methods"][0]["unit_bits"]["blocks.29.down"] in range(3, 7)
    assert re.fullmatch(r"recipe-\d+\.json", download.value.suggested_filename)


def test_hostile_names_are_only_text(page: Page, dashboard: str, screenshot: Callable[[str], Path]) -> None:
    page.goto(dashboard)
    choose(page, "<script>")
    expect(page.locator(".run-name")).to_have_text(HOSTILE)
    page.locator(".js-plotly-plot").hover()
    screenshot("dashboard-hostile-names")
    assert page.title() == "Compression Workbench"
    assert page.locator("img[src=x]").count() == 0


def test_new_run_appears_without_a_restart(page: Page, dashboard: str, home: Path) -> None:
    page.goto(dashboard)
    options = page.get_by_label("Run", exact=True).locator("option")
    expect(options.first).to_be_attached()
    before = options.count()
    with Store(home) as store:
        number = record(store, "made meanwhile", bits=5.5, delta=0.01, ratio=1.3)
        try:
            page.get_by_role("button", name="Refresh").click()
            expect(options).to_have_count(before + 1)
            # The run that was being read stays: nobody likes a page that turns under their eyes.
            expect(page.locator(".run-name")).to_have_text("solved for 4.5 bits")
        finally:
            store.delete_run(number)


def test_empty_store_says_how_to_make_a_first_run(
    page: Page,
    tmp_path: Path,
    start_server: Callable[..., Any],
    free_port: Callable[[], int],
    screenshot: Callable[[str], Path],
) -> None:
    port = free_port()
    # Under a prefix, as behind a proxy.
    url = f"http://127.0.0.1:{port}/user/somebody/dashboard/"
    start_server([sys.executable, "-c", SERVE, str(tmp_path), str(port), "/user/somebody/dashboard"], url)
    page.goto(url)
    expect(page.get_by_text("workbench demo --out out/demo")).to_be_visible()
    screenshot("dashboard-empty")
    with Store(tmp_path) as store:
        record(store, "the first", bits=4.5, delta=0.055, ratio=1.12)
    # Nothing is clicked: an open page looks by itself.
    expect(page.locator(".run-name")).to_have_text("the first")


def websocket_status(dashboard: str, origin: str) -> int:
    """HTTP status of opening the page's websocket from a page of ``origin``; 101 where it is opened."""
    with urllib.request.urlopen(dashboard) as answer:
        found = re.search(r'"token":\s*"([^"]+)"', answer.read().decode())
    assert found is not None
    address = urlsplit(dashboard)
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=30)
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
        "Sec-WebSocket-Protocol": f"bokeh, {found[1]}",
        "Origin": origin,
    }
    with contextlib.closing(connection):
        connection.request("GET", f"{address.path}ws", headers=headers)
        return connection.getresponse().status


def test_websocket_is_opened_only_for_pages_of_this_server(dashboard: str) -> None:
    own = dashboard.rstrip("/")
    port = urlsplit(dashboard).port
    assert websocket_status(dashboard, own) == 101
    foreign = [
        "http://evil.example",
        f"http://evil.example:{port}",
        f"http://127.0.0.1.evil.example:{port}",  # begins like an allowed host
        f"http://127.0.0.1:{port}0",
        f"http://127.0.0.11:{port}",
        f"http://evil127.0.0.1:{port}",
    ]
    assert {origin: websocket_status(dashboard, origin) for origin in foreign} == dict.fromkeys(foreign, 403)


@pytest.mark.parametrize("path", ["../../../../etc/passwd", "admin", "static/../workbench.sqlite", "rest/session_info"])
def test_nothing_else_is_served(dashboard: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{dashboard}{path}")
    assert refused.value.code in (403, 404)


def test_forged_posts_are_refused(dashboard: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(dashboard, data=b"x=1"))
    assert refused.value.code in (403, 405)
