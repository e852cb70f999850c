"""Print a checksum of what every rule's run ends with, so that two revisions can be compared.

    .venv/bin/python scripts/run_sums.py > before.txt
    git switch another-revision
    .venv/bin/python scripts/run_sums.py > after.txt
    diff before.txt after.txt

For each rule the embedded model is trained by four clients for four short rounds. The run is broken
off after the second round and resumed, so that the checkpoint is part of what is compared. Only the
public interface is used, so that the same file runs on revisions whose modules lie elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import fedlora

MIXED, EQUAL = [16, 8, 4, 2], [8, 8, 8, 8]


class BrokenOffError(Exception):
    """Stands for whatever ends a run half way."""


def settings(method: str, output_dir: Path) -> fedlora.Config:
    """Four clients and four rounds of two steps; ranks differ where the rule can combine them."""
    return fedlora.Config(
        model_name_or_path="embedded",
        dataset_name="embedded",
        partition="iid",
        num_clients=4,
        method=method,
        client_ranks=MIXED if fedlora.METHODS[method].mixed_ranks else EQUAL,
        lora_target_modules="all-linear",
        lora_alpha="2r",
        lora_dropout=0.1,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        max_steps=2,
        num_rounds=4,
        eval_rounds=0,
        eval_exact_match=False,
        dtype="float32",
        cohort_size=2,
        num_threads=1,
        use_cpu=True,
        seed=7,
        output_dir=str(output_dir),
    )


def sums(method: str, output_dir: Path) -> dict[str, str]:
    """File of the final directory -> the first 16 digits of its SHA-256."""

    def break_off(result: Any) -> None:
        if result.record.round == 2:
            raise BrokenOffError

    try:
        fedlora.run(settings(method, output_dir), callbacks=[break_off])
    except BrokenOffError:
        final = fedlora.run(resume=output_dir).final_dir
    else:
        raise AssertionError("the run was not broken off")
    files = sorted(final.rglob("adapter_model.safetensors"))
    assert files, f"{final} holds no adapter"
    return {
        str(path.relative_to(final)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in files
    }


def main() -> None:
    """Print one line for every rule and file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*", default=list(fedlora.METHODS), help="rules to run")
    for method in parser.parse_args().methods:
        with tempfile.TemporaryDirectory() as directory:
            for name, digest in sums(method, Path(directory) / "run").items():
                print(f"{method:12} {name:40} {digest}", flush=True)


if __name__ == "__main__":
    main()
