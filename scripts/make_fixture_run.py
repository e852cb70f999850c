"""Makes the run directory that tests keep, as this revision writes one: two rounds of three.

    .venv/bin/python scripts/make_fixture_run.py tests/data/run

Made once, by the code as it stood before its modules moved. It stays as it is: tests resume,
report, watch and evaluate it, so that a run of an earlier revision can always be gone on with.
Paths of the machine that made it are taken out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import fedlora


class BrokenOffError(Exception):
    """Stands for whatever ends a run early."""


def main(directory: Path) -> None:
    """Train the embedded model for two short rounds of three, and break off."""

    def break_off(result: Any) -> None:
        if result.record.round == 2:
            raise BrokenOffError

    config = fedlora.Config(
        model_name_or_path="embedded",
        dataset_name="embedded",
        partition="iid",
        num_clients=3,
        client_ranks=[4, 2, 1],
        lora_target_modules=["q_proj", "v_proj"],
        learning_rate=3e-3,
        max_steps=2,
        num_rounds=3,
        cohort_size=2,
        eval_exact_match=False,
        dtype="float32",
        num_threads=1,
        use_cpu=True,
        seed=7,
        output_dir=str(directory),
    )
    with contextlib.suppress(BrokenOffError):
        fedlora.run(config, callbacks=[break_off])
    take_out_the_machine(directory)


def take_out_the_machine(directory: Path) -> None:
    """Keep the last round alone, and no path that another machine has not."""
    (directory / ".lock").unlink()
    shutil.rmtree(directory / "round-1")
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(text.replace(str(directory), "run"))
    options = directory / "round-2" / "adapter_config.json"
    found = json.loads(options.read_text())
    found["base_model_name_or_path"] = "embedded"
    options.write_text(json.dumps(found, indent=2, sort_keys=True))
    manifest = directory / "round-2" / "manifest.json"
    digests = json.loads(manifest.read_text())
    digests[options.name] = hashlib.sha256(options.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(digests, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
