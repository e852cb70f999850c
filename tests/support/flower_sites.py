"""Carries runs over Flower's apps and a grid in this process, to sites behind real sockets."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.engines.carrier import SiteError
from fedlora.engines.flower import client_app
from fedlora.engines.flower.run_config import config_of
from fedlora.engines.flower.server_app import serve
from fedlora.engines.site_listener import Listener
from fedlora.runs.events import Event, ignore
from fedlora.runs.file_names import CONFIG
from fedlora.runs.results import Result
from support.flower_grid import Errors, InProcessGrid
from support.sites import SiteInMemory, server_keys, sites_of


@dataclass
class Called:
    """A site in memory, as its socket's listener takes it."""

    site: SiteInMemory

    def handle(self, message: bytes, seconds: float | None) -> bytes:
        try:
            return self.site.answer(message)
        except SiteError:
            raise
        except Exception as error:
            raise SiteError("failed", f"{type(error).__name__}: {error}") from None

    def status(self) -> dict[str, Any]:
        return self.site.service.status()

    def cancel(self) -> None:
        self.site.service.cancel()

    def stop(self) -> None:
        pass


@contextmanager
def on_sockets(sites: Mapping[str, SiteInMemory]) -> Iterator[dict[str, str]]:
    """The sites behind sockets of their own: name -> path."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fl")))
        addresses = {}
        for name, site in sites.items():
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            addresses[name] = str(directory / name)
            server.bind(addresses[name])
            server.listen()
            Listener(server, Called(site), token=None).start()
        yield addresses


def server_context(run_config: Mapping[str, Any]) -> Context:
    """What Flower hands a ServerApp beside the grid."""
    return Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )


@dataclass
class OverFlower:
    """Carries whole runs, and goes on with them; see `support.conformance.Carrier`."""

    errors: Errors = lambda message: None
    sites: dict[str, SiteInMemory] = field(default_factory=dict)
    grid: InProcessGrid | None = None

    def __call__(
        self,
        keys: Mapping[str, Any],
        out: Path,
        events: list[Event] | None = None,
        callbacks: Sequence[Callable[[Any], None]] = (),
    ) -> Result:
        assert not callbacks, "a ServerApp calls nobody back"
        self.sites = sites_of(keys, out.parent / f"{out.name} sites")
        plain = server_keys(keys, list(self.sites), out)
        plain = {**plain, "engine": "flower", "num_clients": len(self.sites)}
        del plain["sites"]
        return self._run(config_of({k: x for k, x in plain.items() if x is not None}), events)

    def resume(self, out: Path) -> Result:
        """Go on with a run whose ServerApp was killed, as the app is submitted again."""
        config = Config(**{**read_yaml(out / CONFIG), "output_dir": str(out)})
        return self._run(config, None, resume=True)

    def _run(self, config: Config, events: list[Event] | None, resume: bool = False) -> Result:
        with on_sockets(self.sites) as addresses:
            nodes = [{"socket": address} for address in addresses.values()]
            self.grid = InProcessGrid(client_app.app, nodes, errors=self.errors)
            report = events.append if events is not None else ignore
            return serve(self.grid, server_context({}), config, resume, report)
