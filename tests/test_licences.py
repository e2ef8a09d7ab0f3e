"""docs/licences.md lists what is installed, as it is now."""

from tests.conftest import REPOSITORY
from tests.licences import rows


def test_every_installed_package_is_listed_with_its_version_and_licence():
    listed = (REPOSITORY / "docs" / "licences.md").read_text().splitlines()
    found = rows()
    assert len(found) > 100
    missing = [name for name, version, licence in found if f"| {name} | {version} | {licence} |" not in listed]
    assert missing == [], "make licences writes the file anew"
