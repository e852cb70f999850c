"""Tries the libraries in a process of their own: a broken one is a line and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_PROBE = """
import json, sys
def say(name, work):
    sys.stdout.flush()
    print(json.dumps({"trying": name}), file=out, flush=True)
    try:
        found = work()
    except BaseException as error:
        text = str(error).strip().splitlines()
        found = {"error": f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")}
    print(json.dumps({"name": name, **found}), file=out, flush=True)
def torch():
    import torch
    import torch.nn
    (torch.ones(8, 8) @ torch.ones(8, 8)).sum().item()
    return {"threads": torch.get_num_threads(), "cuda_build": torch.version.cuda,
            "hip_build": getattr(torch.version, "hip", None)}
def cuda():
    import torch
    if not torch.cuda.is_available():
        return {"there": False}
    x = torch.ones(256, 256, device="cuda")
    (x @ x).sum().item()
    free, total = torch.cuda.mem_get_info()
    return {"there": True, "device": torch.cuda.get_device_name(), "free": free, "total": total,
            "devices": torch.cuda.device_count()}
def mps():
    import torch
    return {"there": bool(torch.backends.mps.is_available())}
def transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return {}
def peft():
    from peft import PeftModel
    return {}
def datasets():
    import datasets
    return {"cache": str(datasets.config.HF_DATASETS_CACHE)}
def hub():
    from huggingface_hub import constants
    return {"home": constants.HF_HOME, "cache": constants.HF_HUB_CACHE,
            "offline": constants.HF_HUB_OFFLINE}
out, sys.stdout = sys.stdout, sys.stderr
for work in (torch, cuda, mps, hub, transformers, peft, datasets):
    if work.__name__ not in sys.argv[1:]:
        say(work.__name__, work)
"""
_PROBED = ("torch", "cuda", "mps", "hub", "transformers", "peft", "datasets")
SECONDS = 300
"""That the libraries may take to load; a cold network disk is slow."""


def probe(seconds: float = SECONDS) -> dict[str, dict[str, Any]]:
    """What each library says when it is imported and tried, or `error`.

    A library that takes the process down with it (a crash in native code) has that as its error,
    and the others are tried again without it.
    """
    out: dict[str, dict[str, Any]] = {}
    while missing := [name for name in _PROBED if name not in out]:
        text, error = _run_probe(list(out), seconds)
        trying = missing[0]
        for line in text.splitlines():
            try:
                answer = json.loads(line)
            except ValueError:
                continue
            trying = answer.get("trying", "")
            if "name" in answer:
                out[answer.pop("name")] = answer
        if trying:
            out[trying] = {"error": error}
    return out


def _run_probe(known: Sequence[str], seconds: float) -> tuple[str, str]:
    """What the process said, and how it ended where it did not end well."""
    command = [sys.executable, "-P", "-c", _PROBE, *known]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        return printed.decode() if isinstance(
            printed, bytes
        ) else printed, f"took over {seconds:.0f} s"
    except OSError as error:
        return "", str(error)
    if done.returncode < 0:
        return done.stdout, f"the process crashed (signal {-done.returncode})"
    return done.stdout, f"the process ended with code {done.returncode}"
