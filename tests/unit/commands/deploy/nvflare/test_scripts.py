"""How a site and the server start: a script."""

from __future__ import annotations

from fedlora.commands.deploy.nvflare import scripts


def test_scripts_say_which_python_they_lack() -> None:
    for script in (scripts.SITE, scripts.SERVER):
        assert script.startswith("#!/usr/bin/env bash\n")
        assert "set FEDLORA_PYTHON" in script
