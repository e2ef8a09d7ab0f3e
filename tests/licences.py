"""``python -m tests.licences FILE``: the licence of every installed package that constraints.txt pins, as a table.

Read from the packages' own metadata; nothing is looked up. Where a package does not say its licence, that is shown.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

HEAD = """# Licences

What `make install` brings, by each package's own metadata (`make licences` writes this file). Ours is Apache-2.0.

| package | version | licence |
|---|---|---|
"""
UNKNOWN = "not said"


def licence_of(metadata: importlib.metadata.PackageMetadata) -> str:
    """The SPDX expression, else the classifiers, else the first line of the free text."""
    if expression := metadata.get("License-Expression"):
        return expression
    classified = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    named = [name for name in classified if name != "OSI Approved"]
    if named:
        return ", ".join(named)
    first = (metadata.get("License") or "").strip().splitlines()
    return first[0][:60] if first and first[0] else UNKNOWN


def rows() -> list[tuple[str, str, str]]:
    pinned = re.findall(r"^([\w.-]+)==", (REPOSITORY / "constraints.txt").read_text(), re.M)
    found = []
    for name in pinned:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # Pinned for an extra, or for tests that are not installed here.
            continue
        found.append((name, distribution.version, licence_of(distribution.metadata)))
    return found


def main(path: Path) -> None:
    lines = [f"| {name} | {version} | {licence} |" for name, version, licence in rows()]
    path.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
