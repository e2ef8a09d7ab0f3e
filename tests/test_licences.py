"""docs/licences.md lists what is installed, as it is now."""

import importlib.metadata
import re
from collections.abc import Mapping, Sequence

from packaging.requirements import Requirement

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


def with_exact_requirements(names: set[str], requirements: Mapping[str, Sequence[str]]) -> set[str]:
    """Packages of one version, and what they ask for in one version, as torch does CUDA's libraries."""
    while True:
        asked = {Requirement(text) for name in names for text in requirements.get(name, ())}
        more = {canonical(r.name) for r in asked if any(one.operator == "==" for one in r.specifier)} - names
        if not more:
            return names
        names |= more


def test_every_installed_package_is_pinned():
    """What is not comes in whatever version is the newest on the day of the installation."""
    requirements = {canonical(one.metadata["Name"]): one.requires or [] for one in importlib.metadata.distributions()}
    pinned = {canonical(name) for name in re.findall(r"^([\w.-]+)==", CONSTRAINTS.read_text(), re.M)}
    known = with_exact_requirements(pinned, requirements)
    assert requirements.keys() - known <= {"pip", "setuptools", "wheel", "proving-ground"}


def test_what_a_pinned_package_asks_for_in_one_version_is_pinned_too():
    requirements = {"torch": ["cuda-toolkit==13.0; extra == 'x'", "sympy>=1"], "cuda-toolkit": ["Nvidia_NCCL==2"]}
    assert with_exact_requirements({"torch"}, requirements) == {"torch", "cuda-toolkit", "nvidia-nccl"}
