"""The documents are true."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from app.application import BOUND_AT_ONCE, LISTS_AT_ONCE, SNAPSHOTS_AT_ONCE
from app.live.replay import JUDGED_AT_ONCE, READS_AT_ONCE
from app.settings import Settings, variable

ROOT = Path(__file__).parent.parent
NAMED_TESTS = re.findall(
    r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "GUARANTEES.md").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(("file", "name"), NAMED_TESTS)
def test_a_guarantee_is_proved_by_a_test_that_exists(file: str, name: str) -> None:
    """When a test is renamed, GUARANTEES.md has to follow."""
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_setting_is_in_the_readme() -> None:
    """When a setting is added, the README has to describe it."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| variable |")[2]
    missing = [variable(option) for option in fields(Settings) if variable(option) not in table]
    assert not missing


@pytest.mark.parametrize(
    "document", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name
)
def test_links_lead_somewhere(document: Path) -> None:
    """When a file is moved, links in the documents have to follow."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", ["README.md", "docs/operation.md"])
def test_the_connections_that_a_node_makes(document: str) -> None:
    """When a pool grows, what the documents say of a node's database connections has to follow."""
    listener_and_reader = 2
    replays = READS_AT_ONCE + JUDGED_AT_ONCE
    subscriptions = SNAPSHOTS_AT_ONCE + BOUND_AT_ONCE + LISTS_AT_ONCE
    beyond = listener_and_reader + replays + subscriptions
    assert f"`POOL_SIZE` + {beyond}" in (ROOT / document).read_text(encoding="utf-8")
