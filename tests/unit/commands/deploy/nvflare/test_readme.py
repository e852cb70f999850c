"""The README.md of a participant's folder: who does what."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.deploy.nvflare import readme
from support.federations import LEAD, MEMBER, federation_of

PINS = {"fedlora": "1.2.3", "nvflare": "2.9.0"}


def test_each_says_what_its_reader_does(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, admins={LEAD: "lead", MEMBER: "member"})
    site = readme.site_readme("alpha", federation, PINS)
    assert "localhost:18002" in site
    assert "fedlora doctor --site site.yaml" in site
    server = readme.server_readme(federation, PINS)
    assert "port 18002 and admins port" in server
    assert "127.0.0.1 alone" in server
    lead = readme.admin_readme(LEAD, federation.admins[LEAD], federation, PINS)
    assert f"--engine nvflare --kit {LEAD}/kit" in lead
    member = readme.admin_readme(MEMBER, federation.admins[MEMBER], federation, PINS)
    assert "You cannot start a run" in member
    for text in (site, server, lead, member):
        assert "1.2.3 with nvflare 2.9.0" in text
        assert "{" not in text
