"""Files are the old version or the whole new one, and a path that cannot be written to is said beforehand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workbench.errors import InputError, StoreError
from workbench.files import check_folder, check_output_file, write_json, write_whole


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    write_whole(target, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="disk is full"):
        write_whole(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_the_way_of_a_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        write_whole(tmp_path / "file" / "report.html", "new")
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "file")
    with pytest.raises(StoreError, match="Cannot write"):
        check_output_file(tmp_path / "file" / "x.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="no permission"):
        check_output_file(tmp_path / "x.json")


def test_nan_is_not_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"perplexity": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_output_files_are_checked_without_leaving_anything(tmp_path: Path) -> None:
    assert check_output_file(tmp_path / "new" / "x.json", suffixes=(".json",)) == tmp_path / "new" / "x.json"
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(InputError, match=r"end in \.json"):
        check_output_file(tmp_path / "x.txt", suffixes=(".json",))
    with pytest.raises(InputError, match="is a folder"):
        check_output_file(tmp_path)
