"""The embedded rows are the same in every process, and light to import."""

from __future__ import annotations

import os
import subprocess
import sys

from fedlora.embedded import instructions


def test_rows_do_not_depend_on_the_salt_of_the_builtin_hash() -> None:
    code = "from fedlora.embedded import instructions; print(instructions(40, 7, 'eval'))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": salt},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert printed == {f"{instructions(40, 7, 'eval')}\n"}


def test_import_is_light() -> None:
    code = (
        "import sys, fedlora.embedded; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == "[]"
