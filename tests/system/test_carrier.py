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


def test_the_carrier_imports_no_library() -> None:
    code = (
        "import json, sys; import fedlora.engines.carrier; "
        f"print(json.dumps([name for name in {LIBRARIES} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
