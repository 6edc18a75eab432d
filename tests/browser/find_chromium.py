"""Find a Chromium that starts, and with ``--install`` get one where none is there.

Looked for in this order: ``$CHROMIUM``, the system's, Playwright's own. Installed in this order: the distribution's
package (as root, where apt is), Playwright's download. Needs nothing of the workbench, so it can run before it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW_TO_GET = (
    "Install Chromium (Debian and Ubuntu: apt-get install chromium; elsewhere: "
    ".venv/bin/playwright install --with-deps chromium), or name one: CHROMIUM=/path/to/chromium make test"
)


def find_chromium() -> str | None:
    """Return the path of a Chromium that starts on this machine, or None."""
    return next((path for path in _candidates() if _starts(path)), None)


def install_chromium() -> str | None:
    """Try every way of installing that this user may use; return the path of what then starts, or None."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if os.geteuid() == 0 and shutil.which("apt-get"):
        _try(["apt-get", "-qq", "update"], environment)
        _try(["apt-get", "-qq", "install", "-y", "--no-install-recommends", "chromium"], environment)
        if found := find_chromium():
            return found
    _try([sys.executable, "-m", "playwright", "install", "chromium"], environment)
    return find_chromium()


def _candidates() -> Iterator[str]:
    if named := os.environ.get("CHROMIUM"):
        # A browser that was asked for by name is the only one considered: another would be a silent substitute.
        yield named
        return
    yield from filter(None, map(shutil.which, NAMES))
    # Asking Playwright starts its driver in a child, so that it is not loaded where the system's browser will do.
    ask = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        yield answer.stdout.strip()


def _starts(path: str) -> bool:
    # A file alone proves nothing: Ubuntu's package is a stub for snap, a download may lack system libraries.
    if shutil.which(path) is None:
        return False
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _try(command: Sequence[str], environment: dict[str, str]) -> None:
    sys.stderr.write(f"chromium: {' '.join(map(str, command))}\n")
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        sys.stderr.write(f"chromium: {error}\n")
        return
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines()
        sys.stderr.write(f"chromium: failed: {reason[-1] if reason else f'exit code {done.returncode}'}\n")


def main(arguments: Sequence[str]) -> int:
    """Print the path. Without a browser: say how to get one and return 0, because the tests decide what it means."""
    found = find_chromium()
    if found is None and "--install" in arguments and "CHROMIUM" not in os.environ:
        found = install_chromium()
    if found is None:
        sys.stderr.write(f"chromium: none found, the browser tests will be left out. {HOW_TO_GET}\n")
        return 0
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    sys.stdout.write(f"chromium: {Path(found)} ({version})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
