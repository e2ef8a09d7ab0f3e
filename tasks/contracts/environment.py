"""What settings may say of the ranks' environment: names of variables, and no secret, since settings are kept and shown."""

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""What the name of an environment variable may be."""
SECRET = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY|CREDENTIALS?)(_ID)?$", re.IGNORECASE)


def looks_secret(name: str) -> bool:
    """Whether a variable or setting of that name would hold a secret, as ``HF_TOKEN``."""
    return SECRET.search(name) is not None


def refuse_secrets(env: Mapping[str, str], instead: str) -> None:
    """Raise ValueError where names of ``env`` look like secrets; their values are not told.

    Args:
        instead: what to do with a secret.
    """
    if secret := [name for name in env if looks_secret(name)]:
        raise ValueError(f"{secret} look like secrets, and settings are kept and shown; {instead}")
