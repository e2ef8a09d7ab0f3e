"""What ranks agree on, and who is named when one does not come."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.hardware.host import free_port
from tests.training import toy
from tests.training.test_checkpoints import BINDING, write
from tests.training.toy_ranks import ToyJob, context

pytestmark = pytest.mark.integration


def apart(look: Callable[..., str], folder: Path, num_ranks: int = 2) -> list[str]:
    """What ``look`` says on each rank, each in a process of its own."""
    port = free_port()
    processes = [context.Process(target=_rank, args=(look, folder, r, num_ranks, port)) for r in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [(folder / f"said-{rank}").read_text() for rank in range(num_ranks)]


def _rank(look: Callable[..., str], folder: Path, rank: int, num_ranks: int, port: int) -> None:
    from tasks.training.ranks import Ranks

    sys.stderr = (folder / f"log-{rank}").open("w")
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    (folder / f"said-{rank}").write_text(look(Ranks.join(limit_s=60), folder))


def one_never_comes(ranks, folder: Path) -> str:
    from tasks.training.ranks import MissingRanks

    if ranks.rank == 1:
        time.sleep(3)
        return "late"
    try:
        ranks.barrier("after loading the model", 1)
    except MissingRanks as error:
        return str(error)
    return "all came"


def test_a_barrier_names_the_rank_that_did_not_come(tmp_path):
    said, _, _ = apart(one_never_comes, tmp_path, num_ranks=3)
    assert said.startswith("waited 1 s for all 3 ranks, after loading the model")
    assert "Ranks 1 failed" in said


def agree(ranks, folder: Path) -> str:
    from tasks.training.start import CheckpointNotSeen, agree_on_checkpoint

    # Rank 1 has its own idea of the shared folder.
    checkpoints = folder / ("shared" if ranks.rank == 0 else "other")
    try:
        return str(agree_on_checkpoint(ranks, checkpoints, BINDING, say=print))
    except CheckpointNotSeen as error:
        return str(error)


def test_a_rank_that_does_not_see_the_checkpoint_says_so(tmp_path):
    write(tmp_path / "shared", 5)
    first, second = apart(agree, tmp_path)
    assert first == "5"
    assert second.startswith("rank 1 does not see the checkpoint")
    assert "storage.shared must be one folder, the same on all nodes" in second


def test_a_rank_that_sees_another_checkpoint_of_that_step_says_so(tmp_path):
    write(tmp_path / "shared", 5)
    write(tmp_path / "other", 5, loss=1.0)
    _, second = apart(agree, tmp_path)
    assert "its manifest.json is another one" in second
    assert multiprocessing.active_children() == []


def test_a_network_that_does_not_work_is_told_before_a_model_is_loaded(tmp_path):
    job = ToyJob(tmp_path, toy.arguments(tmp_path, tmp_path / "no-model", tmp_path / "no-rows"))
    attempt = job.start(2, environment={"GLOO_SOCKET_IFNAME": "eth-none"})
    assert attempt.wait() == [1, 1]
    assert "CannotMeet: rank 1 on " in attempt.error(1)
    assert "cannot reach the other ranks over gloo" in attempt.error(1)
    assert "the interfaces named in GLOO_SOCKET_IFNAME=eth-none" in attempt.error(1)
