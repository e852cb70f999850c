"""Machines of a network that are namespaces of this one, with addresses and links of their own.

They need root and iproute2. A bridge joins them with this machine, which has an address there too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field


def why_not() -> str | None:
    """Why there can be none here; None: there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    probe = f"fl{os.getpid()}p"
    done = _ip("netns", "add", probe, check=False)
    if done.returncode:
        return f"ip netns does not work: {done.stderr.strip()}"
    try:
        for what in (
            ("link", "add", f"{probe}b", "type", "bridge"),
            ("link", "add", f"{probe}v", "type", "veth", "peer", "name", f"{probe}w"),
        ):
            if (made := _ip(*what, check=False)).returncode:
                return f"ip {' '.join(what)} does not work: {made.stderr.strip()}"
    finally:
        for name in (f"{probe}b", f"{probe}v"):
            _ip("link", "delete", name, check=False)
        _ip("netns", "delete", probe, check=False)
    return None


@dataclass
class Network:
    """Machines by name, with addresses 10.213.N.1, .2 and so on; this one has .254.

    Args:
        names: of the machines.
    """

    names: Sequence[str]
    _up: list[str] = field(default_factory=list)

    @property
    def _tag(self) -> str:
        return f"fl{os.getpid()}"

    @property
    def _net(self) -> str:
        return f"10.213.{os.getpid() % 250}"

    def address(self, name: str) -> str:
        return f"{self._net}.{self.names.index(name) + 1}"

    def namespace(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def start(self) -> None:
        """Make the machines and their links."""
        bridge = f"{self._tag}br"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{self._net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for name in self.names:
            space, link = self.namespace(name), self._link(name)
            _ip("netns", "add", space)
            self._up.append(name)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", link, "master", bridge)
            _ip("link", "set", link, "up")
            _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def cut(self, name: str) -> None:
        """Take the plug out of a machine."""
        _ip("link", "set", self._link(name), "down")

    def restore(self, name: str) -> None:
        """Put it back."""
        _ip("link", "set", self._link(name), "up")

    def switch_off(self, name: str) -> None:
        """Kill all that runs on a machine, without a word."""
        while pids := _ip("netns", "pids", self.namespace(name)).stdout.split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def within(self, name: str) -> list[str]:
        """What stands before a command that is to run on a machine."""
        return ["ip", "netns", "exec", self.namespace(name)]

    def stop(self) -> None:
        """Switch all machines off, and remove them."""
        for name in self._up:
            self.switch_off(name)
            _ip("netns", "delete", self.namespace(name), check=False)
            _ip("link", "delete", self._link(name), check=False)
        _ip("link", "delete", f"{self._tag}br", check=False)

    def _link(self, name: str) -> str:
        """Its end at this machine; the names of links are short."""
        return f"{self._tag}v{self.names.index(name)}"


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert not check or not done.returncode, f"ip {' '.join(words)}: {done.stderr}"
    return done
