"""What is answered without any work is answered without torch and the like, which take seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "pandas", "pyarrow", "scipy", "sqlalchemy")
CODE = """
import json, sys
from workbench.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.stderr.write(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("bench", "list"), 0, "quantization"),
        (("bench", "recipe"), 2, "Did you mean 'recipes'"),
        (("compress", "smollm2-135m", "--recipe", "recipe.json", "--out", "o"), 2, "Did you mean 'awq'"),
        (("measure", "no-such-folder"), 3, "There is no model"),
    ],
    ids=["benches", "bad-bench", "bad-recipe", "missing-model"],
)
def test_an_answer_without_work_imports_nothing_heavy(
    words: tuple[str, ...], code: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "any", "methods": [{"method": "awk"}]}))
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    *said, loaded = done.stderr.splitlines()
    assert done.returncode == code, done.stderr
    assert says in done.stdout + "".join(said)
    assert not {name.partition(".")[0] for name in json.loads(loaded)} & set(HEAVY)
