"""What is imported with Flower's apps: a ClientApp is a new process for every message."""

from __future__ import annotations

import json
import subprocess
import sys


def imported(statement: str) -> set[str]:
    """The packages that a fresh process has imported after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_a_client_app_imports_no_model_library() -> None:
    packages = imported("import fedlora.engines.flower.client_app")
    assert "flwr" in packages
    assert not packages & {"torch", "transformers", "peft", "datasets", "pydantic", "yaml"}


def test_fedlora_imports_no_flower() -> None:
    packages = imported("import fedlora; fedlora.Config(engine='flower'); fedlora.run")
    assert "flwr" not in packages
