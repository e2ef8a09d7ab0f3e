"""docs/licences.md lists what is installed, as it is now."""

import importlib.metadata
import re

from tests.conftest import REPOSITORY
from tests.licences import rows

CONSTRAINTS = REPOSITORY / "constraints.txt"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_installed_package_is_listed_with_its_version_and_licence():
    listed = (REPOSITORY / "docs" / "licences.md").read_text().splitlines()
    found = rows()
    assert len(found) > 100
    missing = [name for name, version, licence in found if f"| {name} | {version} | {licence} |" not in listed]
    assert missing == [], "make licences writes the file anew"


def test_every_installed_package_is_pinned():
    """What is not comes in whatever version is the newest on the day of the installation."""
    pinned = {canonical(name) for name in re.findall(r"^([\w.-]+)==", CONSTRAINTS.read_text(), re.M)}
    installed = {canonical(one.metadata["Name"]) for one in importlib.metadata.distributions()}
    assert installed - pinned <= {"pip", "setuptools", "wheel", "proving-ground"}
