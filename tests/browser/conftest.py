"""A real Chromium and real servers for the tests in this folder, with nothing left running afterwards."""

from __future__ import annotations

import json
import os
import re
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from workbench.models import LoadedModel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCREENSHOTS = ROOT / "screenshots"

# Loaded by path: test folders are no packages, and `make chromium` runs the same file on its own.
_chromium = runpy.run_path(str(HERE / "find_chromium.py"))

# What Chromium does by itself would reach out to the network, or is not there in a container.
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

# Long enough for a busy machine; a passing test never waits for it.
expect.set_options(timeout=20_000)

_left_out: list[str] = []


@dataclass(frozen=True)
class Server:
    """A server process that answers at ``url``; ``log`` holds what it wrote."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


def in_ci() -> bool:
    """Whether a missing browser is a failure: ``CI`` is set, as every CI service does."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """Path of a Chromium that starts. Without one the test is left out, or fails in CI."""
    found: str | None = _chromium["find_chromium"]()
    if found is None:
        message = "No Chromium on this machine."
        if in_ci():
            pytest.fail(f"{message} {_chromium['HOW_TO_GET']}")
        _left_out.append(message)
        pytest.skip(message)
    return found


# Per module and not per session: while Playwright runs, this thread has a running event loop, in which tests
# elsewhere could not call asyncio.run.
@pytest.fixture(scope="module")
def browser(chromium_path: str) -> Iterator[Browser]:
    """A headless Chromium for the tests of one module."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def console_errors() -> list[str]:
    """Errors on the console and uncaught exceptions of ``page``, in order; a test asserts that it stays empty."""
    return []


@pytest.fixture
def requested_urls() -> list[str]:
    """Every URL that ``page`` asked for, websockets included."""
    return []


@pytest.fixture
def page(
    request: pytest.FixtureRequest, browser: Browser, console_errors: list[str], requested_urls: list[str]
) -> Iterator[Page]:
    """A page in a context of its own; the last state of it is kept as ``screenshots/<test>.png``."""
    context = browser.new_context(viewport={"width": 1360, "height": 900}, locale="en-GB")
    page = context.new_page()

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error":
            console_errors.append(f"{message.text} ({message.location.get('url', '')})")

    page.on("console", on_console)
    page.on("pageerror", lambda error: console_errors.append(f"uncaught: {error}"))
    page.on("request", lambda sent: requested_urls.append(sent.url))
    page.on("websocket", lambda opened: requested_urls.append(opened.url))
    yield page
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{request.node.name}.png")
    context.close()


@pytest.fixture
def screenshot(page: Page) -> Callable[[str], Path]:
    """``screenshot(name)`` keeps the whole page as ``screenshots/<name>.png``, for a person to look at."""

    def take(name: str) -> Path:
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        page.screenshot(path=path, full_page=True)
        return path

    return take


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """``free_port()`` returns a port of the loopback interface that nothing listened on a moment ago."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """``start_server(argv, url, env=..., cwd=..., timeout=60)`` runs a server until the module's tests are done.

    It returns once ``url`` answers (with whatever status), and fails with the server's own words if it never does.
    """
    with ExitStack() as stack:

        def start(
            argv: Sequence[str],
            url: str,
            *,
            env: Mapping[str, str] | None = None,
            cwd: Path = ROOT,
            timeout: float = 60.0,
        ) -> Server:
            log = tmp_path_factory.mktemp("server") / "log.txt"
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    argv,
                    cwd=cwd,
                    env={**os.environ, **(env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # its kernels and workers can then be ended with it
                )
            stack.callback(_stop, process)
            _wait_until_answering(url, process, log, timeout)
            return Server(url, process, log)

        yield start


def _wait_until_answering(url: str, process: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"The server ended with {process.returncode} before it answered:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"{url} did not answer within {timeout:.0f} s:\n{log.read_text()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, ending)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly, right before the summary, that browser tests were left out and what would bring them back."""
    if _left_out:
        terminalreporter.section("LEFT OUT: the browser tests did not run", sep="!", red=True, bold=True)
        terminalreporter.line(f"{_left_out[0]} {_chromium['HOW_TO_GET']}")


@pytest.fixture
def open_lab(
    tmp_path: Path, start_server: Callable[..., Server], free_port: Callable[[], int]
) -> Callable[[Path, str], str]:
    """``open_lab(notebook, parameters)``: a JupyterLab with nothing of the user's settings; returns the notebook's URL.

    The cell tagged ``parameters`` holds the given source, and no cell an output: what is seen was made here.
    """

    def opened(path: Path, parameters: str) -> str:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = parameters
        work = tmp_path / "work"
        work.mkdir()
        nbformat.write(notebook, work / path.name)
        settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        quiet = {"fetchNews": "false", "checkForUpdates": False}
        (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))

        port, token = free_port(), secrets.token_urlsafe(16)
        base = f"http://127.0.0.1:{port}"
        start_server(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--ServerApp.ip=127.0.0.1",
                f"--ServerApp.port={port}",
                "--ServerApp.port_retries=0",
                f"--IdentityProvider.token={token}",
                f"--ServerApp.root_dir={work}",
            ],
            f"{base}/api",
            env={
                "WORKBENCH_HOME": str(tmp_path / "home"),
                "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
                "JUPYTER_DATA_DIR": str(tmp_path / "data"),
                "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
                "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
                "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
                "IPYTHONDIR": str(tmp_path / "ipython"),
            },
            timeout=90.0,
        )
        return f"{base}/lab/tree/{path.name}?token={token}"

    return opened


@pytest.fixture
def tiny_folder(
    tmp_path: Path, make_model: Callable[..., LoadedModel], save_model: Callable[[LoadedModel, Path], Path]
) -> Path:
    """A tiny random model as a folder."""
    return save_model(make_model(), tmp_path / "tiny-model")


@pytest.fixture
def run_all(page: Page) -> Callable[..., None]:
    """``run_all(url, height=...)`` opens a notebook in a window that shows all of it, and runs its cells."""

    def run(url: str, *, height: int) -> None:
        page.set_viewport_size({"width": 1400, "height": height})
        page.goto(url)
        expect(page.locator(".jp-Notebook .jp-CodeCell").first).to_be_visible(timeout=60_000)
        expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name=re.compile("^Run All Cells$")).click()

    return run


@pytest.fixture
def nothing_amiss(page: Page, console_errors: list[str], requested_urls: list[str]) -> Callable[[], None]:
    """``nothing_amiss()``: no cell and no console had an error, and nothing left the machine."""

    def check() -> None:
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        assert console_errors == []
        away = [url for url in requested_urls if not re.match(r"(https?|ws)://127\.0\.0\.1[:/]|data:|blob:", url)]
        assert away == []

    return check
