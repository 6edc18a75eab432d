# The compiled kernels (kernels/cpu/bindings.cpp). `cpu.py` and `cpu_build.py` are their only users.
from typing import Any

MAX_ROWS: int

def __getattr__(name: str) -> Any: ...
