"""The ledger proves what it should, and nothing when it cannot."""

import json

import pytest

from tasks.training.ledger import Ledger, LedgerError, Start, committed, main, prove


def start(attempt: str, from_step: int, **changes) -> Start:
    values = {"world_size": 2, "global_batch_size": 2, "steps_per_epoch": 3, "num_rows": 7}
    return Start(attempt, from_step, **(values | changes))


ROWS = {1: [0, 1], 2: [2, 3], 3: [4, 5], 4: [6, 5], 5: [4, 3], 6: [2, 1]}


def write(folder, begin: Start, upto: int, rows=ROWS) -> None:
    ledger = Ledger(folder, begin)
    for step in range(begin.from_step + 1, upto + 1):
        ledger.record(step, rows[step])
    ledger.flush(upto)


def test_steps_that_were_lost_and_done_again_count_once(tmp_path):
    write(tmp_path, start("001", 0), 5)
    write(tmp_path, start("002", 2), 4)
    write(tmp_path, start("003", 4, world_size=1), 6)
    proof = prove(tmp_path)
    assert (proof.num_starts, proof.num_steps, proof.rows_per_epoch, proof.num_redone) == (3, 6, 6, 3)
    assert committed(tmp_path)[1] == ROWS


def test_lines_wait_for_the_checkpoint_that_makes_them_count(tmp_path):
    ledger = Ledger(tmp_path, start("001", 0))
    for step in (1, 2, 3):
        ledger.record(step, ROWS[step])
    ledger.flush(2)
    assert set(committed(tmp_path)[1]) == {1, 2}
    ledger.flush(3)
    assert set(committed(tmp_path)[1]) == {1, 2, 3}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS | {3: [4, 1]}, "row 1 was used in steps 1 and 3 of one epoch"),
        (ROWS | {2: [2]}, "step 2 used 1 rows instead of 2"),
        (ROWS | {6: [2, 9]}, "step 6 used row 9 of 7"),
    ],
)
def test_a_row_used_twice_a_short_batch_and_an_unknown_row_are_found(tmp_path, rows, message):
    write(tmp_path, start("001", 0), 6, rows)
    with pytest.raises(LedgerError, match=message):
        prove(tmp_path)
    assert main(["ledger", str(tmp_path.parent)]) == 1


def test_a_missing_step_and_a_start_from_nowhere_are_found(tmp_path):
    write(tmp_path / "a", start("001", 0), 4)
    lines = (tmp_path / "a" / "0001.jsonl").read_text().splitlines()
    del lines[2]
    (tmp_path / "a" / "0001.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match="step 2 is missing"):
        prove(tmp_path / "a")
    write(tmp_path / "b", start("001", 0), 2)
    write(tmp_path / "b", start("002", 3), 4)
    with pytest.raises(LedgerError, match="goes on from step 3 and the starts before it left 2"):
        prove(tmp_path / "b")


def test_two_starts_never_write_one_file(tmp_path):
    Ledger(tmp_path, start("001", 0))
    Ledger(tmp_path, start("001", 0))
    assert [json.loads(path.read_text())["from_step"] for path in sorted(tmp_path.glob("*.jsonl"))] == [0, 0]
