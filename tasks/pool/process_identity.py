"""Which process a number meant: process ids are used again, and the clock that dates a start may be set meanwhile."""

from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def identity_of(pid: int) -> str | None:
    """This boot and the clock ticks from it to the process's start (proc(5): the 22nd field of ``stat``).

    psutil's ``create_time`` is a date: it moves when the machine's clock is set. Two processes of one number in one boot
    never started in one tick. None where no such process lives; a zombie does not.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command's name in parentheses and may hold anything, a parenthesis too.
    fields = stat.rpartition(")")[2].split()
    state, start_ticks = fields[0], fields[19]
    return None if state in "ZX" else f"{BOOT_ID.read_text().strip()}/{start_ticks}"
