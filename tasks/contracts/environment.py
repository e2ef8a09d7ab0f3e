"""What settings may say of the ranks' environment: names of variables, and no secret, since settings are kept and shown."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field

EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""What the name of an environment variable may be."""
SECRET = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY|CREDENTIALS?)(_ID)?$", re.IGNORECASE)


def looks_secret(name: str) -> bool:
    """Whether a variable or setting of that name would hold a secret, as ``HF_TOKEN``."""
    return SECRET.search(name) is not None


ASSIGNED = re.compile(r"(?:^|[\s,;=])([A-Za-z_]\w*)=(?![\s$\"']*\$|[\s\"']*$)")
"""A variable that a line of shell, or of a scheduler's options, gives a value that is not another variable's."""


def refuse_secrets_in_lines(lines: Iterable[str], instead: str) -> None:
    """Raise ValueError where a line writes out a variable whose name looks like a secret's; its value is not told."""
    refuse_secrets({name: "" for line in lines for name in ASSIGNED.findall(line)}, instead)


def refuse_secrets(env: Mapping[str, str], instead: str) -> None:
    """Raise ValueError where names of ``env`` look like secrets; their values are not told.

    Args:
        instead: what to do with a secret.
    """
    if secret := [name for name in env if looks_secret(name)]:
        raise ValueError(f"{secret} look like secrets, and settings are kept and shown; {instead}")
