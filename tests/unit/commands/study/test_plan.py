"""A study laid out: the names of its runs' directories."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedlora.commands.study.load import load_study
from fedlora.commands.study.plan import Planned, shipped

RUN = Planned("table", {"method": "flora"}, 3, {"method": "flora", "num_rounds": 2})


def test_the_same_settings_are_the_same_directory() -> None:
    assert RUN.directory.startswith("flora-seed-3-")
    turned = replace(RUN, part="other", labels={}, keys=dict(reversed(RUN.keys.items())))
    assert turned.directory == RUN.directory
    others = [
        replace(RUN, seed=4),
        replace(RUN, alone=1),
        replace(RUN, trainer="adalora"),
        replace(RUN, keys={**RUN.keys, "num_rounds": 3}),
    ]
    assert len({RUN.directory, *(other.directory for other in others)}) == 5
    assert others[1].directory.startswith("flora-alone-1-seed-3-")
    assert others[2].directory.startswith("flora-adalora-seed-3-")
    assert replace(RUN, called="mine").directory == "mine"


def test_its_configuration() -> None:
    config = RUN.config(Path("out/x"))
    assert (config.method, config.num_rounds, config.seed) == ("flora", 2, 3)
    assert config.output_dir == "out/x"


def test_the_studies_of_the_package_can_be_laid_out() -> None:
    for name in shipped():
        study = load_study(name, seeds=[0])
        assert study.name == name
        assert study.runs
        assert {run.part for run in study.runs} <= {part.name for part in study.parts}
