"""Looks at what a run needs: Python, libraries, device, memory, disk, cores, extras."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from fedlora import __version__

OK, WARNING, PROBLEM = "ok", "warning", "problem"
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what.
        state: `ok`, `warning` (a run works, perhaps slowly or in part) or `problem` (it does not).
        found: what there is.
        remedy: what to do; "" where all is well.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Machine:
    """What the checks look at.

    Args:
        output_dir: where a run would be written.
        probed: library -> what importing and trying it said, see `probe`.
    """

    output_dir: Path
    probed: Mapping[str, Mapping[str, Any]]


def _python(machine: Machine) -> Iterator[Check]:
    """Python against what the package declares, and whether the package is installed."""
    version = f"{platform.python_version()} ({sys.executable})"
    try:
        wanted = metadata.metadata("fedlora")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield Check("Python", OK, version)
        yield Check("fedlora", WARNING, f"{__version__}, not installed", "pip install .")
        return
    fits = not wanted or Requirement(f"python{wanted}").specifier.contains(
        platform.python_version(), prereleases=True
    )
    remedy = "" if fits else f"make a virtual environment with Python {wanted}"
    yield Check("Python", OK if fits else PROBLEM, version, remedy)
    yield Check("fedlora", OK, __version__)


def requirements(extra: str = "") -> list[Requirement]:
    """What the installed package declares that it needs, or needs for an extra."""
    try:
        declared = metadata.requires("fedlora") or []
    except metadata.PackageNotFoundError:
        return []
    needed = [Requirement(line) for line in declared]
    if not extra:
        return [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        r
        for r in needed
        if r.marker and not r.marker.evaluate({"extra": ""}) and r.marker.evaluate({"extra": extra})
    ]


def shortfall(requirement: Requirement) -> str | None:
    """What is wrong with the installed version of a package; None: it is there and fits."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "not installed"
    try:
        fits = requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return None  # a build of somebody's own, which only they can judge
    return None if fits else f"{version}, not {requirement.specifier}"


_TRIED = ("torch", "transformers", "peft", "datasets")


def _libraries(machine: Machine) -> Iterator[Check]:
    """Every library that a run needs: installed, of a version that fits, and working."""
    others = []
    for requirement in requirements():
        wrong = shortfall(requirement)
        if requirement.name in _TRIED:
            continue
        if wrong:
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Check(requirement.name, PROBLEM, wrong, remedy)
        else:
            others.append(requirement.name)
    declared = {r.name: r for r in requirements()}
    for name in _TRIED:
        wanted = declared.get(name, Requirement(name))
        wrong, error = shortfall(wanted), machine.probed[name].get("error")
        remedy = f"pip install '{name}{wanted.specifier}'"
        if wrong:
            yield Check(name, PROBLEM, wrong, remedy)
        elif error:
            again = f"pip install --force-reinstall '{name}{wanted.specifier}'"
            if name != "torch" and "error" in machine.probed["torch"]:
                again = "mend torch first"
            yield Check(name, PROBLEM, f"{metadata.version(name)}, does not work: {error}", again)
        else:
            yield Check(name, OK, metadata.version(name))
    if others:
        yield Check("other libraries", OK, f"{len(others)} as declared")


def _device(machine: Machine) -> Iterator[Check]:
    """The GPU or the CPU that a run would take, and why a GPU is not found."""
    torch, cuda, mps = (machine.probed[name] for name in ("torch", "cuda", "mps"))
    if "error" in torch:
        return  # said already
    if "error" in cuda:
        remedy = "see nvidia-smi; --use_cpu runs without the GPU"
        yield Check("device", PROBLEM, f"the GPU does not work: {cuda['error']}", remedy)
    elif cuda["there"]:
        free, total = cuda["free"], cuda["total"]
        more = f", the first of {cuda['devices']}" if cuda["devices"] > 1 else ""
        text = f"{cuda['device']}{more}, {_gib(free)} of {_gib(total)} free"
        if free < total / 4:
            remedy = "see nvidia-smi for who uses it; CUDA_VISIBLE_DEVICES chooses another"
            yield Check("device", WARNING, text, remedy)
        else:
            yield Check("device", OK, text)
    elif torch["cuda_build"] or torch["hip_build"]:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        text = "CPU; this torch is built for a GPU, and finds none"
        if hidden is not None:
            text += f" (CUDA_VISIBLE_DEVICES={hidden})"
        yield Check("device", WARNING, text, "see nvidia-smi: is there a GPU, and its driver?")
    elif shutil.which("nvidia-smi") and _runs("nvidia-smi", "-L"):
        text = "CPU; there is a GPU, and this torch is built without CUDA"
        remedy = "install torch as https://pytorch.org/get-started/locally says"
        yield Check("device", WARNING, text, remedy)
    else:
        text = "CPU" + ("; Apple's GPU is not used" if mps.get("there") else "")
        yield Check("device", OK, text)


def _runs(*command: str) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def memory() -> tuple[int, int] | None:
    """Bytes free and in all, within a container's limit; None: the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
        return total, total
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = int(Path(folder, limit).read_text())
            now = int(Path(folder, used).read_text())
        except (OSError, ValueError):
            continue
        if most < total:
            return max(0, min(free, most - now)), most
    return free, total


def _memory(machine: Machine) -> Iterator[Check]:
    sizes = memory()
    if sizes is None:
        return
    free, total = sizes
    text = f"{_gib(free)} of {_gib(total)} free"
    if free < GIB:
        remedy = "end other programs; the libraries alone take about 1 GiB"
        yield Check("memory", WARNING, text, remedy)
    else:
        yield Check("memory", OK, text)


def _disk(machine: Machine) -> Iterator[Check]:
    """Whether the places that a run writes to can be written, and have room."""
    probed = machine.probed
    default = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = [("output", machine.output_dir, "give another --output_dir")]
    hub = Path(probed["hub"].get("cache") or os.environ.get("HF_HUB_CACHE") or default / "hub")
    places.append(("cache of models", hub, "set HF_HOME or HF_HUB_CACHE to another place"))
    data = probed["datasets"].get("cache") or os.environ.get("HF_DATASETS_CACHE")
    remedy = "set HF_HOME or HF_DATASETS_CACHE to another place"
    places.append(("cache of data", Path(data or default / "datasets"), remedy))
    try:
        places.append(("temporary files", Path(tempfile.gettempdir()), "set TMPDIR"))
    except OSError as error:
        yield Check("temporary files", PROBLEM, str(error), "set TMPDIR to a writable directory")
    for name, path, remedy in places:
        yield _place(name, path, remedy)


def _place(name: str, path: Path, remedy: str) -> Check:
    """Whether files can be made at a path, or where it would come to be, and the room there."""
    there = path.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".fedlora-doctor-") as file:
            file.write(b"x")
            file.flush()
        free = shutil.disk_usage(there).free
    except OSError as error:
        where = str(path) if there == path.expanduser().absolute() else f"{path} (in {there})"
        return Check(name, PROBLEM, f"{where} cannot be written: {error.strerror}", remedy)
    text = f"{path}, {_gib(free)} free"
    if free < GIB / 4:
        return Check(name, PROBLEM, text, f"free some space, or {remedy}")
    if free < 5 * GIB:
        return Check(name, WARNING, text, f"models are large: free some space, or {remedy}")
    return Check(name, OK, text)


def cores() -> float:
    """Processors this process may use: its affinity and its container's share."""
    try:
        number = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # macOS
        number = float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(number, int(quota) / int(period))
    except (OSError, ValueError):
        return number


_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def _cores(machine: Machine) -> Iterator[Check]:
    """Cores and torch's threads on them, and how busy the machine is."""
    number, threads = cores(), machine.probed["torch"].get("threads")
    given = [f"{k}={os.environ[k]}" for k in _THREADS if os.environ.get(k)]
    text = f"{number:g}" + (f", torch takes {threads} threads" if threads else "")
    text += f" ({', '.join(given)})" if given else ""
    if threads and threads > max(number, 1):
        remedy = f"--num_threads {max(1, int(number))}: more threads than cores wait for each other"
        yield Check("cores", WARNING, text, remedy)
    else:
        yield Check("cores", OK, text)
    try:
        load = os.getloadavg()[0]
    except OSError:
        return
    text = f"{load:.1f} processes over the last minute, {number:g} cores"
    if load > 0.6 * number:
        remedy = (
            "the machine is busy: threads that wait for a core slow a run down many times; wait, "
            "or give --num_threads 1"
        )
        yield Check("load", WARNING, text, remedy)
    else:
        yield Check("load", OK, text)


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def _network(machine: Machine) -> Iterator[Check]:
    given = [f"{key}={os.environ[key]}" for key in _OFFLINE if os.environ.get(key)]
    if machine.probed["hub"].get("offline"):
        remedy = "unset it to fetch models and data by their hub names; what is cached is found"
        yield Check("hub", WARNING, f"offline ({', '.join(given)})", remedy)
    else:
        yield Check("hub", OK, "online" + (f" ({', '.join(given)})" if given else ""))


EXTRAS = {
    "eval": "fedlora eval --tasks, and its judge",
    "trackers": "report_to",
    "nvflare": "fedlora deploy nvflare, and runs with --engine nvflare",
    "flower": "runs with --engine flower",
    "gguf": "fedlora export --format gguf",
    "quantized": "load_in_8bit and load_in_4bit",
}


def _extras(machine: Machine) -> Iterator[Check]:
    for extra, purpose in EXTRAS.items():
        wrong = {r.name: shortfall(r) for r in requirements(extra)}
        missing = [f"{name} {why}" for name, why in wrong.items() if why]
        name = f"extra {extra}"
        if missing:
            remedy = f"pip install 'fedlora[{extra}]' for {purpose}"
            yield Check(name, WARNING, ", ".join(missing), remedy)
        elif wrong:
            yield Check(name, OK, ", ".join(wrong))


CHECKS: Sequence[Callable[[Machine], Iterator[Check]]] = (
    _python,
    _libraries,
    _device,
    _cores,
    _memory,
    _disk,
    _network,
    _extras,
)
"""In the order they are shown. A new one is a function here."""


def examine(machine: Machine) -> list[Check]:
    """All checks; one that fails itself is a line too."""
    out: list[Check] = []
    for check in CHECKS:
        try:
            out += check(machine)
        except Exception as error:
            name = check.__name__.removeprefix("_")
            out.append(Check(name, WARNING, f"could not be looked at: {error}", "report this"))
    return out
