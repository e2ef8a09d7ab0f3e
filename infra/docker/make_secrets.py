"""``python infra/docker/make_secrets.py [FOLDER]``: the secrets of compose.yaml, made once; those that exist are kept.

FOLDER is infra/docker/secrets unless given; git ignores it. The folder is its owner's alone; whoever gets there can read its
files, since compose mounts them with this machine's owner and mode, and each container has a user of its own.
"""

import os
import secrets
import sys
from pathlib import Path

NAMES = (
    "postgres_password",
    "prefect_database_password",
    "mlflow_database_password",
    "mlflow_admin_password",
    "flask_key",
)
PREFECT_AUTH = "prefect_auth"
"""`user:password`, as Prefect wants it."""
PREFECT_PASSWORD = "prefect_password"  # noqa: S105 - a file's name
"""What stands behind the colon there, as Prometheus wants it (infra/monitoring/prometheus.yaml)."""
HUB_TOKEN = "hub_token"  # noqa: S105 - a file's name
"""Of Hugging Face's hub, for gated models; empty until somebody puts theirs there."""


def make_secrets(folder: Path) -> list[str]:
    """Write those that are missing; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    wanted = {name: secrets.token_urlsafe(24) for name in NAMES}
    wanted[PREFECT_AUTH] = f"admin:{secrets.token_urlsafe(24)}"
    wanted[HUB_TOKEN] = ""
    made = []
    for name, secret in wanted.items():
        try:
            _write(folder / name, secret)
        except FileExistsError:
            continue
        made.append(name)
    _, password = (folder / PREFECT_AUTH).read_text().split(":", 1)
    copy = folder / PREFECT_PASSWORD
    # No secret of its own: it follows the other when that is made anew.
    if not copy.exists() or copy.read_text() != password:
        copy.unlink(missing_ok=True)
        _write(copy, password)
    return made


def _write(path: Path, secret: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "w") as out:
        out.write(secret)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "secrets"
    made = make_secrets(target)
    print(f"{target}: made {', '.join(made) or 'nothing, all are there'}")
