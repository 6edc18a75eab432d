"""The managers' page: the runs of a store, one of them in plain words, and all of them in one picture. Read-only.

A Panel skin over ``RunsController``. Nothing is loaded from elsewhere than the server itself, and whatever comes out
of a run is escaped: names of models and runs were chosen by whoever made them.
"""

from __future__ import annotations

import errno
import io
import ipaddress
import logging
import socket
from collections.abc import Callable
from functools import cache
from importlib import resources
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
import panel as pn
import psutil
from plotly.colors import sample_colorscale

from workbench.errors import InputError, StoreError
from workbench.view import runs as view
from workbench.view.plots import bits_table
from workbench.view.style import SEQUENTIAL

if TYPE_CHECKING:
    from workbench.store import Store

logger = logging.getLogger(__name__)

DEFAULT_PORT = 5006
REFRESH_S = 15
TITLE = "Compression Workbench"
# The page only reads: what a browser sends are choices from lists, which fit into a fraction of this.
MAX_MESSAGE_BYTES = 1 << 20
# A session token opens one websocket right after the page was fetched; five minutes forgive a slow start.
TOKEN_LIFETIME_S = 300
# A page that was fetched and never connected, or that lost its connection, holds its memory no longer than this.
UNUSED_SESSION_MS = 60_000
ALL_MODELS = ""
# Four bars that get shorter, inline: under a proxy's path the server has no place of its own for an icon.
ICON = (
    "data:image/svg+xml,"
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='3' "
    "fill='%2314304a'/%3E%3Cpath d='M4 13V3M7 13V6M10 13V8M13 13v-3' stroke='white' stroke-width='2'/%3E%3C/svg%3E"
)


class Dashboard:
    """One reader's page: widgets, panes, and what happens when a choice changes.

    Args:
        store: where the runs are; it is read, never written.
    """

    def __init__(self, store: Store) -> None:
        self._runs = view.RunsController(store)
        self._shown: int | None = None
        self._model = pn.widgets.Select(
            label="Model", options={"All models": ALL_MODELS}, width=260, margin=(0, 16, 0, 0)
        )
        self._run = pn.widgets.Select(label="Run", options={}, width=620, margin=(0, 16, 0, 0))
        self._refresh = pn.widgets.Button(
            label="Refresh", color="primary", variant="outline", width=110, margin=0, align="end"
        )
        self._recipe = pn.widgets.FileDownload(
            callback=self._recipe_file,
            filename="recipe.json",
            label="Download recipe (JSON)",
            width=230,
            margin=(10, 0, 0, 0),
        )
        self._notice, self._summary, self._empty = _html(), _html(), _html(_part("empty"))
        self._bits, self._table, self._environment = _html(), _html(), _html()
        self._pareto = pn.pane.Plotly(
            sizing_mode="stretch_width", height=430, margin=0, config={"displaylogo": False, "responsive": True}
        )
        self._details = pn.Column(
            self._summary,
            _html("<h2>All runs: size against quality</h2>"),
            self._pareto,
            _html("<h2>What was picked: bits of each unit</h2>"),
            self._bits,
            self._recipe,
            _html("<h2>All runs: numbers</h2>"),
            self._table,
            _html("<h2>What it was measured on</h2>"),
            self._environment,
            sizing_mode="stretch_width",
        )
        self.update()
        self._model.param.watch(self._on_model, "value")
        self._run.param.watch(self._on_run, "value")
        self._refresh.on_click(lambda _: self.update())
        self._pareto.param.watch(self._on_click, "click_data")

    def page(self) -> pn.Template:
        """The whole page, which looks for new runs by itself as long as it is open."""
        template = pn.Template(_source("page.html"))
        template.add_variable("page_css", _source("page.css"))
        template.add_variable("app_favicon", ICON)
        template.add_variable("apple_icon", ICON)
        template.add_panel("controls", pn.Row(self._model, self._run, self._refresh, sizing_mode="stretch_width"))
        template.add_panel("notice", self._notice)
        template.add_panel("content", pn.Column(self._empty, self._details, sizing_mode="stretch_width"))
        pn.state.add_periodic_callback(self.update, period=REFRESH_S * 1000)
        return template

    def update(self) -> None:
        """Read the store, and show what is new. A store that cannot be read is said on the page."""
        try:
            changed = self._runs.refresh()
        except StoreError as error:
            logger.warning("%s", error)
            self._notice.object = _part("notice", str(error))
            return
        self._notice.object = ""
        if changed or self._shown is None:
            self._show(self._shown)

    def _on_model(self, event: Any) -> None:
        self._runs.model = event.new or None
        self._show(self._shown)

    def _on_run(self, event: Any) -> None:
        if event.new is not None and event.new != self._shown:
            self._show(event.new)

    def _on_click(self, event: Any) -> None:
        points = (event.new or {}).get("points") or [{}]
        number = points[0].get("customdata")
        # It comes from the browser, so that it may be anything.
        if isinstance(number, int) and any(run.id == number for run in self._runs.runs):
            self._show(number)

    def _show(self, wanted: int | None) -> None:
        """Show a run (or the newest, where there is none of that number) and the picture of all."""
        run = self._runs.run(wanted)
        with pn.io.hold():
            self._empty.visible, self._details.visible = run is None, run is not None
            # The number comes first, so that the widgets' own events below find nothing left to do.
            self._shown = run.id if run else None
            models = {"All models": ALL_MODELS} | {model: model for model in self._runs.models}
            self._model.param.update(options=models, value=self._runs.model or ALL_MODELS)
            self._run.param.update(options={view.label(each): each.id for each in self._runs.runs}, value=self._shown)
            if run is None:
                return
            everything = view.table(self._runs.runs)
            self._summary.object = _part("summary", run, view.moment(run.created_at), view.cards(run), view.notes(run))
            self._pareto.object = view.pareto_of_runs(everything, run.id)
            self._table.object = _part("table", [_line(each) for each in everything.itertuples()], run.id)
            self._environment.object = _part("environment", view.environment_facts(run), run.recipe_sha256)
            bits = view.bits_by_unit(run)
            try:
                self._bits.object = _part("bits", _bits_grid(bits), _counts(bits))
            except InputError as error:  # a unit whose name has no place in the grid
                self._bits.object = _part("notice", str(error))
            self._recipe.visible = view.recipe_json(run) is not None
            self._recipe.filename = f"recipe-{run.id}.json"

    def _recipe_file(self) -> io.BytesIO:
        run = self._runs.run(self._shown)
        return io.BytesIO(((run and view.recipe_json(run)) or "").encode())


def serve(
    store: Store,
    *,
    port: int = DEFAULT_PORT,
    address: str = "127.0.0.1",
    prefix: str = "",
    show: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the dashboard until the process is interrupted.

    There is no login: who reaches the port reads the page. That is why it listens on loopback unless told otherwise.
    Websockets are accepted only from pages of this server: foreign pages in the same browser are refused.

    Args:
        store: where the runs are.
        port: 1 to 65535.
        address: IPv4 address or host name to listen on; ``0.0.0.0`` for every interface.
        prefix: path under which a reverse proxy shows the page, such as ``/user/me/dashboard``; the proxy passes
            the whole path on, and sets ``Origin`` to the address and port given here.
        show: open a browser.
        on_ready: called with the page's URL once the server listens.

    Raises:
        InputError: the address or port cannot be used.
    """
    origins = _origins(address, port)
    # Once, and here: a library that configures Panel on import would change the notebook that imports it.
    pn.extension("plotly")
    # The first figure of a process costs seconds of imports: better now than in front of the first reader.
    view.pareto_of_runs(view.table([]))
    try:
        server = pn.io.server.get_server(
            {"/": lambda: _page(store)},
            port=port,
            address=address,
            prefix=prefix,
            title=TITLE,
            websocket_origin=origins,
            show=show,
            xsrf_cookies=True,
            include_headers=[],  # sessions carry what they were given, and this page needs none of it
            include_cookies=[],
            session_token_expiration=TOKEN_LIFETIME_S,
            unused_session_lifetime_milliseconds=UNUSED_SESSION_MS,
            websocket_max_message_size=MAX_MESSAGE_BYTES,
        )
    except (OSError, OverflowError) as error:
        raise _cannot_listen(address, port, error) from error
    if not _is_loopback(address):
        logger.warning("The dashboard has no login: everybody who reaches %s:%d can read it.", address, port)
    server.start()
    if on_ready is not None:
        on_ready(f"http://{address}:{port}{server.prefix}/")
    try:
        server.io_loop.start()
    except KeyboardInterrupt:
        logger.info("The dashboard was stopped.")
    finally:
        server.stop()


def _page(store: Store) -> pn.Template | pn.pane.HTML:
    """A reader's page. A defect goes to the log: Panel would put the traceback into the page, and not escaped."""
    try:
        return Dashboard(store).page()
    except Exception:
        logger.exception("The dashboard's page could not be made")
        return _html(_part("notice", "This page could not be made. The log of the server says why."))


def _origins(address: str, port: int) -> list[str]:
    """``host:port`` of every page that may open a websocket: names under which a browser reaches this server."""
    if not 1 <= port <= 65535:
        raise InputError(f"Port {port} does not exist: give one from 1 to 65535, such as {DEFAULT_PORT}.")
    if ":" in address:
        raise InputError(f"'{address}' is an IPv6 address, which is not supported: give an IPv4 address or a name.")
    if address == "0.0.0.0":
        hosts = {entry.address for card in psutil.net_if_addrs().values() for entry in card if entry.family == 2}
        hosts |= {"localhost", socket.gethostname(), socket.getfqdn()}
    else:
        hosts = {address} | ({"localhost"} if _is_loopback(address) else set())
    return [f"{host}:{port}" for host in sorted(hosts)]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _cannot_listen(address: str, port: int, error: Exception) -> InputError:
    reason = error.errno if isinstance(error, OSError) else None
    if reason == errno.EADDRINUSE:
        return InputError(f"Port {port} of {address} is taken: stop what uses it, or choose another with --port.")
    if reason == errno.EACCES:
        return InputError(f"Port {port} is reserved for the administrator: choose one above 1023 with --port.")
    return InputError(
        f"Cannot listen on {address}:{port} ({error}): give an address of this machine, such as 127.0.0.1."
    )


# ----------------------------------------------------------------------------------------------------- rendering


@cache
def _source(name: str) -> str:
    return (resources.files("workbench.view") / "templates" / "dashboard" / name).read_text(encoding="utf-8")


@cache
def _parts() -> Any:
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_source("parts.html"))


def _part(name: str, *arguments: object) -> str:
    """HTML of one macro of ``parts.html``; every argument is escaped there."""
    parts: ModuleType = _parts().module
    return str(getattr(parts, name)(*arguments))


def _html(text: str = "") -> pn.pane.HTML:
    return pn.pane.HTML(text, stylesheets=[_source("panes.css")], sizing_mode="stretch_width", margin=0)


def _line(line: Any) -> dict[str, object]:
    def ratio(value: float) -> str:
        return view.NOT_MEASURED if pd.isna(value) else f"{value:.3f}x"

    return {
        "run": line.run,
        "date": view.moment(line.created_at),
        "name": line.name,
        "model": line.model,
        "method": line.method,
        "effective_bits": view.NOT_MEASURED if pd.isna(line.effective_bits) else f"{line.effective_bits:.2f}",
        "weights": ratio(line.bytes_ratio),
        "latency": ratio(line.latency_ratio),
        "perplexity": ratio(line.perplexity_ratio),
        "kl": view.NOT_MEASURED if pd.isna(line.kl_mean) else f"{line.kl_mean:.4f}",
    }


def _bits_grid(bits: dict[str, float]) -> dict[str, object] | None:
    """Blocks across, kinds of unit down; each cell with its text and colours."""
    if not bits:
        return None
    grid = bits_table(bits)
    rows = [
        (str(kind), [_cell(value) for value in values]) for kind, values in zip(grid.index, grid.values, strict=True)
    ]
    return {"blocks": list(grid.columns), "rows": rows}


def _cell(bits: float) -> dict[str, str]:
    if pd.isna(bits):
        return {"text": "", "background": "transparent", "color": "inherit"}
    share = min(max((bits - 2) / 6, 0.0), 1.0)  # from 2 bits to 8; uncompressed shares the end of the scale
    (background,) = sample_colorscale(SEQUENTIAL, [share])
    return {"text": f"{bits:g}", "background": background, "color": "#fff" if share < 0.55 else "#1f2933"}


def _counts(bits: dict[str, float]) -> str:
    widths = sorted(set(bits.values()))
    return ", ".join(f"{list(bits.values()).count(width)} of {len(bits)} units at {width:g} bits" for width in widths)
