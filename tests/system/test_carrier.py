"""What calls a worker starts at once, for it imports the standard library alone."""

from __future__ import annotations

import json
import subprocess
import sys

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "pydantic",
    "yaml",
)


def imported_with(module: str) -> list[str]:
    """The libraries that a fresh process holds once it has imported a module."""
    code = (
        f"import json, sys; import {module}; "
        f"print(json.dumps([name for name in {LIBRARIES} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def test_the_carrier_imports_no_library() -> None:
    assert imported_with("fedlora.engines.carrier") == []


def test_the_process_that_supervises_a_worker_is_light() -> None:
    """It reads the site's file, and that is all that it needs libraries for."""
    assert set(imported_with("fedlora.engines.site_process")) <= {"pydantic", "yaml"}
    assert imported_with("fedlora.engines.site_child") == []
