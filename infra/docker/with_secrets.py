"""``with_secrets.py COMMAND ...``: every NAME_FROM_FILE in the environment becomes NAME with that file's content.

Secrets lie in files that the container sees alone; they stand neither in an image nor in compose.yaml nor among a process's
arguments, which every user of a machine can read.
"""

import os
import sys
from pathlib import Path

SUFFIX = "_FROM_FILE"


def with_secrets(environment: dict[str, str]) -> dict[str, str]:
    """The environment with the files' contents, without the line break at their end.

    Raises:
        SystemExit: a file cannot be read, or is empty; the message names variable and file, never a content.
    """
    result = {name: value for name, value in environment.items() if not name.endswith(SUFFIX)}
    for name in environment.keys() - result.keys():
        path = Path(environment[name])
        try:
            secret = path.read_text().rstrip("\n")
        except OSError as error:
            raise SystemExit(
                f"{name}={path}: {error.strerror}; infra/docker/make_secrets.py writes such files"
            ) from error
        if not secret:
            raise SystemExit(f"{name}={path} is empty; infra/docker/make_secrets.py writes such files")
        result[name.removesuffix(SUFFIX)] = secret
    return result


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    os.execvpe(sys.argv[1], sys.argv[1:], with_secrets(dict(os.environ)))  # noqa: S606 - The command is the image's own.
