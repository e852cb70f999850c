"""A small federation's file, as `fedlora deploy flower` reads it."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.federation_file import FederationFile, read_federation

TEXT = """\
name: clinics
server: {{host: {host}, port: {port}, admin_port: {loopback}}}
sites:
  alpha: {{bounds: {{lora_r: 16}}, model_name_or_path: embedded}}
{more}admins: {{ada@example.org: lead}}
"""


def federation(
    directory: Path,
    host: str = "localhost",
    port: int = 8002,
    loopback: int = 8003,
    sites: tuple[str, ...] = ("beta",),
) -> FederationFile:
    """Of the site alpha and others, written to a directory and read."""
    more = "".join(f"  {name}:\n" for name in sites)
    text = TEXT.format(host=host, port=port, loopback=loopback, more=more)
    (directory / "clinics.yaml").write_text(text)
    return read_federation(directory / "clinics.yaml")
