"""`fedlora plan` refuses what it cannot look at."""

from __future__ import annotations

import pytest

from fedlora.commands.plan.verb import verb
from fedlora.errors import InputError


def test_rows_at_sites_are_not_looked_at() -> None:
    with pytest.raises(InputError, match="which lie at the sites"):
        verb(["--engine", "sites", "--sites", "a=a.sock"])


def test_automatic_ranks_need_a_size_of_memory() -> None:
    with pytest.raises(InputError, match="client_memory: \\[6GB, 12GB\\]"):
        verb(["--client_ranks", "auto"])
    with pytest.raises(InputError, match="'6 pounds' is no size of memory"):
        verb(["--client_memory", "6 pounds"])
