"""What the kernel's log tells of GPUs."""

import os


def xids() -> list[str] | str:
    """Lines of the kernel's log that tell of errors of GPUs; or why it cannot be read."""
    try:
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return f"the kernel's log cannot be read: {error.strerror}"
    lines: list[str] = []
    try:
        while True:
            try:
                line = os.read(descriptor, 8192).decode(errors="replace")
            except BlockingIOError:
                return lines
            except BrokenPipeError:
                # Overwritten while we read: the next one follows.
                continue
            except OSError as error:
                return f"the kernel's log cannot be read: {error.strerror}"
            if not line:
                return lines
            if "NVRM: Xid" in line:
                lines.append(line.partition(";")[2].strip())
    finally:
        os.close(descriptor)
