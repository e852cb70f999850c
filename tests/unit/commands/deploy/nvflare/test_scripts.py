"""How a site and the server start: a script."""

from __future__ import annotations

import inspect

from nvflare.private.fed.client import communicator

from fedlora.commands.deploy.nvflare import scripts


def test_scripts_say_which_python_they_lack() -> None:
    for script in (scripts.SITE, scripts.SERVER):
        assert script.startswith("#!/usr/bin/env bash\n")
        assert "set FEDLORA_PYTHON" in script


def test_a_client_that_hangs_after_its_login_is_known_by_words_of_flare() -> None:
    words = "Failed to login the client"
    assert f'grep -q "{words}"' in scripts.SITE
    assert words in inspect.getsource(communicator)
