"""The command line as people and scripts use it: the loop on a tiny model, and every mistake in one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from workbench.apply import nested, nested_tune
from workbench.cli import console, main
from workbench.errors import ModelError
from workbench.formats.compressed import CompressedModel
from workbench.store import Store


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of one's own, long enough for some windows."""
    path = tmp_path / "mine.txt"
    path.write_text("The quick brown fox jumps over the lazy dog and goes home again. " * 120)
    return path


SMALL = ("--prompts", "1", "--new-tokens", "8", "--windows", "2", "--group-size", "16")


def test_the_loop(workbench: Callable[..., Any], tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    """Look, solve, compress, generate, measure and report, each step from the files of the one before."""
    profile, recipe, folder = tmp_path / "units.parquet", tmp_path / "recipe.json", tmp_path / "small"
    seen = workbench("analyze", "sensitivity", tiny_folder, "--out", profile, "--kl", "--json", *SMALL)
    assert seen.code == 0, seen.err
    assert seen.json["damage"] == "kl"
    assert len(seen.json["units"]) == 12
    assert not seen.json["cached"]
    assert workbench("analyze", "sensitivity", tiny_folder, "--kl", "--json", *SMALL).json["cached"]

    solved = workbench("solve", profile, "--bits", "5.5", "--pin", "blocks.0.down=8", "--out", recipe, "--json")
    assert solved.code == 0, solved.err
    assert solved.json["achieved_bits"] <= 5.5
    assert solved.json["unit_bits"]["blocks.0.down"] == 8
    assert solved.json["damage"]["column"] == "kl"

    made = workbench("compress", tiny_folder, "--recipe", recipe, "--out", folder, "--json")
    assert made.code == 0, made.err
    assert made.json["effective_bits"] == pytest.approx(solved.json["achieved_bits"])
    again = workbench("compress", tiny_folder, "--recipe", recipe, "--out", tmp_path / "twice", "--json")
    assert again.json["sha256"] == made.json["sha256"]
    assert (folder / "weights.safetensors").read_bytes() == (tmp_path / "twice/weights.safetensors").read_bytes()

    replies = [workbench("generate", folder, "Hello", "--new-tokens", "6", "--json").json["tokens"] for _ in range(2)]
    assert replies[0] == replies[1]

    sizes = ("--windows", "4", "--window-length", "48", "--pairs", "2", "--threads", "1")
    measured = workbench("measure", folder, "--text", text, "--out", tmp_path / "m.json", "--json", *sizes)
    assert measured.code == 0, measured.err
    dense, compressed = measured.json["rows"]
    assert compressed["kl_mean"] > dense["kl_mean"] == 0
    assert compressed["text"] == dense["text"] == "mine.txt"
    assert compressed["ms_per_token"] > 0
    assert json.loads((tmp_path / "m.json").read_text())["rows"] == measured.json["rows"]

    page = tmp_path / "report.html"
    assert workbench("report", measured.json["run"], "--out", page).code == 0
    assert "blocks.0.down" in page.read_text() or "Bits of each unit" in page.read_text()
    listed = workbench("store", "runs", "--json")
    assert [run["id"] for run in listed.json] == [measured.json["run"]]
    assert workbench("store", "verify").code == 0


def test_tables_for_people(workbench: Callable[..., Any], tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    seen = workbench("analyze", "sensitivity", tiny_folder, "--text", text, "--out", tmp_path / "u.csv", *SMALL)
    assert seen.code == 0, seen.err
    assert "worst first" in seen.out
    assert "blocks.2." in seen.out
    assert set(pd.read_csv(tmp_path / "u.csv").columns) >= {"unit", "bits", "fisher", "gradient", "stored_bits"}
    solved = workbench("solve", tiny_folder, "--bits", "7", "--out", tmp_path / "r.json")
    assert solved.code == 0, solved.err
    assert "Achieved" in solved.out
    assert workbench("doctor").code == 0
    assert workbench("store", "info").code == 0
    assert workbench("store", "gc", "--dry-run").code == 0
    assert workbench("bench", "list").code == 0


def test_text_that_was_solved_on_cannot_judge(
    workbench: Callable[..., Any], tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    profile, recipe = tmp_path / "u.parquet", tmp_path / "r.json"
    workbench("analyze", "sensitivity", tiny_folder, "--text", text, "--out", profile, *SMALL)
    workbench("solve", profile, "--bits", "6", "--out", recipe)
    workbench("compress", tiny_folder, "--recipe", recipe, "--out", tmp_path / "small")
    judged = workbench("measure", tmp_path / "small", "--text", text)
    assert judged.code == 2
    assert "mine" in judged.err


def recipe_for(tmp_path: Path, **changes: Any) -> Path:
    method = {"method": "rtn", "bits": 4, "group_size": 16, **changes}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"schema_version": 1, "model": "any", "methods": [method]}))
    return path


def test_every_mistake_is_one_line_with_what_to_do(
    workbench: Callable[..., Any], tiny_folder: Path, tmp_path: Path, home: Path
) -> None:
    empty, tiny, pickled, binary = (tmp_path / n for n in ("empty.txt", "tiny.txt", "model.bin", "cut.gguf"))
    empty.write_text("")
    tiny.write_text("Too short.")
    pickled.write_bytes(b"\x80\x04.")
    binary.write_bytes(b"GGUF\x03\x00\x00\x00\x05\x00\x00\x00")
    (tmp_path / "file").write_text("in the way")
    good = recipe_for(tmp_path)
    cases: list[tuple[int, str, tuple[object, ...]]] = [
        (3, "Did you mean 'smollm2-135m'", ("compress", "smollm2-135", "--recipe", good, "--out", tmp_path / "o")),
        (3, "safetensors", ("analyze", "sensitivity", pickled)),
        (3, "GGUF", ("analyze", "sensitivity", binary)),
        (2, "empty", ("analyze", "sensitivity", tiny_folder, "--text", empty)),
        (2, "tokens", ("analyze", "sensitivity", tiny_folder, "--text", tiny)),
        (2, "There is no", ("analyze", "sensitivity", tiny_folder, "--text", "proze")),
        (2, "2 to 8", ("analyze", "sensitivity", tiny_folder, "--widths", "1,4")),
        (2, "list of whole numbers", ("analyze", "sensitivity", tiny_folder, "--widths", "4,x")),
        (2, "not among", ("analyze", "sensitivity", tiny_folder, "--widths", "2,3")),
        (2, ".parquet", ("analyze", "sensitivity", tiny_folder, "--out", tmp_path / "u.txt")),
        (4, "choose another folder", ("analyze", "sensitivity", tiny_folder, "--out", "/proc/none/u.csv")),
        (2, "one budget", ("solve", tiny_folder, "--out", tmp_path / "r.json")),
        (2, "UNIT=BITS", ("solve", tiny_folder, "--bits", "4", "--pin", "blocks.0.down")),
        (2, "No profile", ("solve", tmp_path / "none.parquet", "--bits", "4")),
        (2, "Cannot read", ("compress", tiny_folder, "--recipe", tmp_path / "none.json", "--out", tmp_path / "o")),
        (2, "file", ("compress", tiny_folder, "--recipe", good, "--out", tmp_path / "file")),
        (4, "choose another", ("compress", tiny_folder, "--recipe", good, "--out", "/proc/none")),
        (2, "not a compressed model", ("measure", tiny_folder)),
        (2, "empty", ("generate", tiny_folder, " ")),
        (2, "temperature", ("generate", tiny_folder, "Hi", "--top-p", "0")),
        (5, "No engine 'gpu'", ("generate", tiny_folder, "Hi", "--engine", "gpu")),
        (2, "Did you mean 'recipes'", ("bench", "recipe")),
        (4, "choose another", ("demo", "--out", "/proc/none")),
        (2, "file", ("demo", "--out", tmp_path / "file")),
        (2, "demo", ("store", "runs", "--kind", "demos")),
        (2, "99", ("report", "99", "--out", tmp_path / "r.html")),
    ]
    for code, words, arguments in cases:
        started = time.monotonic()
        outcome = workbench(*arguments)
        line = outcome.line
        assert words in line, (arguments, line)
        assert outcome.code == code, (arguments, line)
        assert time.monotonic() - started < 30
    with Store() as store:
        assert store.verify() == []
    assert not (tmp_path / "o").exists()


def test_a_model_that_is_not_there_is_one_error_everywhere(workbench: Callable[..., Any], tmp_path: Path) -> None:
    good, none, out = recipe_for(tmp_path), tmp_path / "none", tmp_path / "o"
    for arguments in (
        ("analyze", "sensitivity", none),
        ("solve", none, "--bits", "4", "--out", tmp_path / "r.json"),
        ("compress", none, "--recipe", good, "--out", out),
        ("generate", none, "Hi"),
        ("generate", none, "Hi", "--engine", "cpu"),
        ("generate", none, "Hi", "--width", "4"),
        ("generate", none, "Hi", "--target", "4"),
        ("generate", none, "Hi", "--sparsity", "0.4"),
        ("retune", none, "--log", tmp_path / "log.json", "--out", out),
        ("measure", none),
        ("demo", "--model", none, "--out", out),
    ):
        outcome = workbench(*arguments)
        assert outcome.line.startswith(f"Error: There is no model '{none}': "), arguments
        assert outcome.code == 3, arguments
    with pytest.raises(ModelError, match="There is no model"):
        CompressedModel.load(none)


def test_a_device_that_is_not_there_is_an_error_at_once(
    workbench: Callable[..., Any], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    good, out = recipe_for(tmp_path), tmp_path / "o"
    for arguments, code, said in (
        (("compress", tiny_folder, "--recipe", good, "--out", out, "--device", "cuda"), 2, "sees 0 CUDA devices"),
        (("compress", tiny_folder, "--recipe", good, "--out", out, "--device", "gpu"), 2, "choose cpu, cuda"),
        (("generate", tiny_folder, "Hi", "--device", "cuda"), 2, "sees 0 CUDA devices"),
        (("generate", tiny_folder, "Hi", "--device", "cuda", "--engine", "cpu"), 5, "does not run on 'cuda'"),
    ):
        outcome = workbench(*arguments)
        assert outcome.code == code, arguments
        assert said in outcome.line, arguments
    assert not out.exists()
    made = workbench("compress", tiny_folder, "--recipe", good, "--out", out, "--device", "cpu")
    assert made.code == 0, made.err
    refused = workbench("generate", out, "Hi", "--device", "cuda", "--engine", "cpu")
    assert refused.code == 5, "a folder is no way around it"


def test_compress_goes_on_after_an_interruption(
    workbench: Callable[..., Any], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"method": "nested", "widths": [3, 4], "group_size": 16, "calibration_tokens": 512, "tune_steps": 1}
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"model": "any", "methods": [method]}))
    with monkeypatch.context() as patched:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(nested_tune, "tune", stop)
        first = workbench("compress", tiny_folder, "--recipe", recipe, "--out", tmp_path / "o")
    assert first.code == 130
    assert "Finished parts are kept" in first.err
    assert not (tmp_path / "o").exists()
    monkeypatch.setattr(nested, "fit_matrix", lambda *_: pytest.fail("fitted again"))
    done = workbench("compress", tiny_folder, "--recipe", recipe, "--out", tmp_path / "o")
    assert done.code == 0
    assert re.search(r"Going on after an interrupted fit of nested: \d+ finished parts kept\.", done.err)
    with Store() as store:
        assert store.info()["checkpoints"] == 0


def test_compress_says_what_was_asked_how_long_it_took_and_what_comes_next(
    workbench: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a name with spaces"
    plain = workbench("compress", tiny_folder, "--recipe", recipe_for(tmp_path), "--out", folder)
    assert plain.code == 0, plain.err
    assert "none" not in plain.out  # no budget, so nothing of it
    assert re.search(r"^Time of the fit: \d+ s\.$", plain.out, re.MULTILINE)
    following = [shlex.split(line)[-3:] for line in plain.out.splitlines() if "workbench generate" in line]
    assert following == [["generate", str(folder), "Why is the sky blue?"]]
    assert f"Next: workbench measure '{folder}'" in plain.out

    solved = tmp_path / "solved.json"
    assert workbench("solve", tiny_folder, "--bits", "7", "--out", solved).code == 0
    assert (
        "(asked for: 7 average bits)"
        in workbench("compress", tiny_folder, "--recipe", solved, "--out", folder, "--overwrite").out
    )


def test_a_table_shows_the_columns_that_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["method", "bits", *(f"column_{i}" for i in range(12))]
    frame = pd.DataFrame([[f"rtn {row}", row, *(row / 3 for _ in range(12))] for row in range(3)], columns=names)
    monkeypatch.setattr(console, "out", Console(width=60, file=sys.stdout))
    console.show_table("Bench", frame, rows=2, more="the file has them")
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines()[:-1])) <= 60
    for shown in ("method", "rtn 0", "rtn 1", "column_2", "0.3333", "... and 1 more"):
        assert shown in said
    assert "rtn 2" not in said
    left = said[said.index("No room for") :].replace("\n", " ")
    assert "No room for column_3, column_4, column_5, column_6, column_7, column_8 and 3 more" in left
    assert "the file has them" in left
    monkeypatch.setattr(console, "out", Console(width=400, file=sys.stdout))
    console.show_table("Bench", frame)
    said = capsys.readouterr().out
    assert "column_11" in said
    assert "No room" not in said


def test_progress_in_a_log_is_said_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines at the beginning of stages and, far enough apart in time, of share and remaining time; not every step."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with console.running() as job:
        job.stage("search", 100)
        for _ in range(60):
            clock[0] += 1
            job.advance()
        job.stage("tune", 10, done=4)
        job.note("A note.")
    assert capsys.readouterr().err.splitlines() == [
        "search ...",
        *(f"search: {n} %, about {100 - n} s left in this step ..." for n in (20, 40, 60)),
        "tune: 40 %, the rest now ...",
        "A note.",
    ]
    with console.running(quiet=True) as job:
        job.stage("search", 2)
        clock[0] += 100
        job.advance()
        job.note("A note.")
    assert capsys.readouterr().err == ""


def test_impossible_budgets_and_unknown_units_say_what_is_possible(
    workbench: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "u.parquet"
    workbench("analyze", "sensitivity", tiny_folder, "--out", profile, *SMALL)
    low = workbench("solve", profile, "--bits", "1.5", "--out", tmp_path / "r.json")
    assert low.code == 2
    assert "possible are" in low.line
    unit = workbench("solve", profile, "--bits", "5", "--pin", "blocks.0.dwn=4")
    assert "Did you mean 'blocks.0.down'" in unit.line
    unknown = workbench(
        "compress",
        tiny_folder,
        "--recipe",
        recipe_for(tmp_path, unit_bits={"blocks.9.qkv": 3}),
        "--out",
        tmp_path / "o",
    )
    assert unknown.code == 2
    assert "blocks.9.qkv" in unknown.line
    assert not (tmp_path / "r.json").exists()
    assert not (tmp_path / "o").exists()


def test_debug_shows_the_traceback(workbench: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="No profile"):
        main(["solve", str(tmp_path / "none.parquet"), "--bits", "4", "--debug"])


def test_wrong_usage_is_one_line_and_where_help_is(workbench: Callable[..., Any]) -> None:
    for arguments, words, command in (
        (("analyze", "sensitvity", "x"), "'sensitvity'", "workbench analyze"),
        (("nonsense",), "'nonsense'", "workbench"),
        (("demo",), "'--out'", "workbench demo"),
        (("generate", "--temperatur", "1"), "--temperature", "workbench generate"),
        (("generate", "m", "p", "--new-tokens", "x"), "a whole number is needed", "workbench generate"),
        (("generate", "m", "p", "--new-tokens", "0"), "must be at least 1", "workbench generate"),
    ):
        found = workbench(*arguments)
        assert found.code == 2
        error, hint = found.err.splitlines()
        assert error.startswith("Error: ")
        assert words in error
        assert hint == f"See '{command} --help'."
    assert workbench("--help").code == 0
    assert workbench("generate", "--help").code == 0


def test_the_doctor_speaks_in_plain_lines(workbench: Callable[..., Any]) -> None:
    found = workbench("doctor")
    assert found.code == 0
    facts = [line for line in found.out.splitlines() if not line.startswith("[")]
    assert not set("{}[]'") & set("".join(facts))
    assert set(workbench("doctor", "--json").json) == {"machine", "checks", "store", "store_error"}


def test_interrupt_cancels_cleanly_and_the_same_call_resumes(tiny_folder: Path, home: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of an analysis: exit 130, one line, an intact store; then the same call finishes."""
    words = [sys.executable, "-m", "workbench", "analyze", "sensitivity", str(tiny_folder), "--kl"]
    words += ["--windows", "40", "--prompts", "8", "--new-tokens", "100", "--out", str(tmp_path / "u.parquet")]
    environment = {**os.environ, "WORKBENCH_HOME": str(home), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("unit-"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "resume" in err
    assert not (tmp_path / "u.parquet").exists()
    with Store(home) as store:
        assert store.verify() == []
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "u.parquet").exists()
