"""A process is told from a later one of its number, and from what is left of it."""

import os
import subprocess
import sys

from tasks.pool.process_identity import identity_of


def test_it_is_the_same_however_often_it_is_asked_and_another_processs_is_another():
    assert identity_of(os.getpid()) == identity_of(os.getpid())
    assert identity_of(os.getpid()) != identity_of(os.getppid())


def test_a_name_with_parentheses_and_spaces_does_not_shift_the_fields(tmp_path):
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "30"])
    try:
        other = subprocess.Popen(["/bin/sleep", "30"])
        ticks = [int(identity_of(p.pid).rpartition("/")[2]) for p in (process, other)]
        assert 0 <= ticks[1] - ticks[0] < 1000
    finally:
        for p in (process, other):
            p.kill()
            p.wait()


def test_a_zombie_and_a_process_that_never_was_have_none():
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert identity_of(process.pid) is None
    process.wait()
    assert identity_of(process.pid) is None
