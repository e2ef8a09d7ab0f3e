"""One burst of somebody else's on a filesystem is no fault of a node, and nodes stay in step whatever one of them meets."""

import errno
import os
from types import SimpleNamespace

import pytest

from tasks.cluster import storage
from tasks.contracts.cluster_settings import StorageProbeSettings

SETTINGS = StorageProbeSettings(file_mbytes=1, num_small_files=2, num_repeats=3)
NO_FAULTS = SimpleNamespace(before_write=lambda folder: None)


class Recorder:
    def __init__(self):
        self.figures, self.problems = {}, []

    def figure(self, name, value):
        self.figures[name] = value

    def distribution(self, name, values):
        self.figures[name] = len(values)

    def problem(self, gate, error):
        self.problems.append((gate, error))


def measure(tmp_path, process=0, faults=NO_FAULTS):
    begun = []
    meeting = SimpleNamespace(
        process=process,
        rank=0,
        node=0,
        host="here",
        recorder=Recorder(),
        begin=begun.append,
        gather=lambda word: [word],
    )
    for name in ("shared", "scratch"):
        (tmp_path / name).mkdir(exist_ok=True)
    storage.measure_storage(meeting, SETTINGS, tmp_path / "shared", tmp_path / "scratch", faults)
    return meeting.recorder, begun


def test_both_filesystems_have_their_figures_and_nothing_stays(tmp_path):
    recorder, _ = measure(tmp_path)
    assert not recorder.problems
    for root in ("shared", "scratch"):
        assert recorder.figures[f"{root}_write_gbytes_per_s"] > 0
        assert recorder.figures[f"{root}_read_gbytes_per_s"] > 0
        assert recorder.figures[f"{root}_small_file_create_ms"] == SETTINGS.num_repeats * 2
        assert not list((tmp_path / root).iterdir())


def test_one_slow_time_of_three_does_not_count(tmp_path, monkeypatch):
    rates = iter([(1.0, 2.0), (0.1, 0.2), (1.1, 2.2)] * 2)
    monkeypatch.setattr(storage, "_large", lambda settings, folder: next(rates))
    recorder, _ = measure(tmp_path)
    assert recorder.figures["scratch_write_gbytes_per_s"] == 1.0
    assert recorder.figures["scratch_read_gbytes_per_s"] == 2.0


def test_nor_does_a_stall_in_one_of_three_rounds_of_small_files(tmp_path, monkeypatch):
    rounds = iter([([0.1, 0.1], [0.05, 0.05]), ([0.1, 9.0], [0.05, 0.05]), ([0.1, 0.1], [0.1, 0.1])] * 2)
    monkeypatch.setattr(storage, "_small", lambda settings, folder: next(rounds))
    recorder, _ = measure(tmp_path)
    assert recorder.figures["shared_small_files_per_s"] == pytest.approx(2 / 0.4)
    assert recorder.figures["shared_small_file_create_ms"] == 6


def test_a_folder_that_cannot_be_looked_into_is_told_and_ends_no_rank(tmp_path, monkeypatch):
    _, expected = measure(tmp_path)

    def refusing(method):
        def refuse(path, *args, **kwargs):
            if path.name.startswith(".cluster-check-here"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return method(path, *args, **kwargs)

        return refuse

    # As another user's folder does; root, who runs tests, is refused nothing.
    for name in ("mkdir", "exists"):
        monkeypatch.setattr(storage.Path, name, refusing(getattr(storage.Path, name)))
    recorder, begun = measure(tmp_path)
    assert [gate for gate, _ in recorder.problems] == ["shared_writable", "scratch_writable"]
    assert begun == expected


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize(
    ("step", "figure"), [("_large", "shared_write_gbytes_per_s"), ("_small", "shared_small_files_per_s")]
)
def test_a_full_disk_is_told_once_and_the_other_nodes_are_not_kept_waiting(tmp_path, monkeypatch, step, figure, bad):
    _, expected = measure(tmp_path)
    write, times = getattr(storage, step), []

    def full(settings, folder):
        times.append(folder)
        if len(times) == bad:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(settings, folder)

    monkeypatch.setattr(storage, step, full)
    recorder, begun = measure(tmp_path)
    assert recorder.problems == [("shared_has_space", f"{tmp_path / 'shared'}: No space left on device")]
    assert begun == expected
    assert len(times) == bad + SETTINGS.num_repeats
    assert (figure in recorder.figures) == (bad > 1)
    assert figure.replace("shared", "scratch") in recorder.figures


def test_what_is_read_back_must_be_what_was_written(tmp_path, monkeypatch):
    fsync = storage.os.fsync

    def flip(file):
        fsync(file)
        path = next(tmp_path.glob("shared/*/large"), None)
        if path is not None:
            content = bytearray(path.read_bytes())
            content[7] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(storage.os, "fsync", flip)
    recorder, _ = measure(tmp_path)
    assert [gate for gate, _ in recorder.problems] == ["shared_correct"]
    assert "shared_write_gbytes_per_s" not in recorder.figures


def test_only_the_first_process_of_a_node_writes_and_the_others_keep_in_step(tmp_path):
    _, expected = measure(tmp_path)
    recorder, begun = measure(tmp_path, process=1)
    assert begun == expected
    assert not recorder.figures


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_want_of_space_is_the_shared_filesystems_and_on_scratch_the_nodes_own(tmp_path, number):
    def refuse(folder):
        raise OSError(number, "refused", folder)

    recorder, _ = measure(tmp_path, faults=SimpleNamespace(before_write=refuse))
    shared = "shared_writable" if number == errno.EROFS else "shared_has_space"
    assert [gate for gate, _ in recorder.problems] == [shared, "scratch_writable"]


def test_a_word_that_did_not_fit_on_the_shared_filesystem_accuses_no_mount(tmp_path, monkeypatch):
    def full(path, word):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.Path, "write_text", full)
    recorder, _ = measure(tmp_path)
    assert [gate for gate, _ in recorder.problems] == ["shared_has_space"]
    assert not list((tmp_path / "shared").iterdir())


def test_what_a_killed_process_of_this_node_left_is_removed_and_nothing_of_others(tmp_path):
    gone = 1 << 23  # more than any process's number
    others = {
        f".cluster-check-here-0-{os.getppid()}",
        f".cluster-check-here-1-{gone}",
        f".cluster-check-here-0-1-{gone}",
    }
    for root in ("shared", "scratch"):
        for name in {f".cluster-check-here-0-{gone}", *others}:
            (tmp_path / root / name).mkdir(parents=True)
            (tmp_path / root / name / "large").write_text("x")
    measure(tmp_path)
    for root in ("shared", "scratch"):
        assert {path.name for path in (tmp_path / root).iterdir()} == others
