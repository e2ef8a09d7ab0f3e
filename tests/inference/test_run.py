"""The loss on expected answers is the same however it comes about."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.contracts.attempt import Attempt
from tasks.contracts.conversation import example_to_record
from tasks.contracts.files import write_json
from tasks.hardware.host import free_port
from tasks.inference.losses import answer_loss, plain_conversations

pytestmark = pytest.mark.integration

NUM_EXAMPLES, NUM_LOSS_ROWS = 6, 4


@pytest.fixture
def one_rank(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))


def answered(home: Path, storage: Path, number: str, **inference) -> dict:
    """An attempt of one rank; what earlier attempts of the same settings answered lies beside it."""
    from tasks.inference.run import run

    (home / "dataset").mkdir(parents=True, exist_ok=True)
    records = [example_to_record(example) for example in plain_conversations()[:NUM_EXAMPLES]]
    pq.write_table(pa.Table.from_pylist(records), home / "dataset" / "test.parquet")
    folder = home / "job" / number
    folder.mkdir(parents=True)
    settings = {"batch_size": 3, "max_new_tokens": 3, "num_loss_rows": NUM_LOSS_ROWS, "precision": "float32"}
    arguments = {
        "model": {"name": "embedded"},
        "inference": settings | inference,
        "storage": str(storage),
        "dataset": str(home / "dataset"),
        "output": str(home / "answers"),
        "adapter": None,
    }
    write_json(folder / "spec.json", {"arguments": arguments})
    (home / "job" / "NEWEST").write_text(number)
    return dict(run(Attempt(folder)))


def test_the_loss_is_that_of_a_pass_of_its_own_for_a_whole_run_a_resumed_one_and_drawn_answers(
    one_rank, tmp_path, model_storage, embedded_model
):
    from tasks.dataset.rendering.family import detect_family, family_for
    from tasks.models.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(embedded_model)
    family = family_for(detect_family(embedded_model), tokenizer)
    rows = sorted(plain_conversations()[:NUM_EXAMPLES], key=lambda e: e.id)[:NUM_LOSS_ROWS]
    expected = answer_loss(load_model(embedded_model, "float32").eval(), tokenizer, family, rows).mean

    whole = answered(tmp_path, model_storage, "001")
    assert (whole["num_answered_before"], whole["reference_loss"]) == (0, pytest.approx(expected, rel=1e-4))
    # Two of the rows whose loss is wanted were answered by an attempt that was killed.
    lines = (tmp_path / "job" / "001" / "partial-0.jsonl").read_text().splitlines(keepends=True)
    before = [line for line in lines if json.loads(line)["example_id"] in (rows[0].id, rows[2].id)]
    (tmp_path / "job" / "001" / "partial-0.jsonl").write_text("".join(before))
    shutil.rmtree(tmp_path / "answers")
    resumed = answered(tmp_path, model_storage, "002")
    assert (resumed["num_answered_before"], resumed["reference_loss"]) == (2, pytest.approx(expected, rel=1e-4))
    drawn = answered(tmp_path / "drawn", model_storage, "001", temperature=1.0)
    assert drawn["reference_loss"] == pytest.approx(expected, rel=1e-4)
