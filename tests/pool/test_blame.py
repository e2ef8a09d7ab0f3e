"""Whose fault the end of a job is, from what torchrun recorded of ranks that died, hung, and lost each other."""

from tasks.pool.failures import blamed_ranks


def failure(rank: int, exit_code: int, message: str) -> dict:
    return {"rank": rank, "exit_code": exit_code, "message": message, "traceback": "", "time": 1}


LOST_PEER = failure(0, 1, "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3921")
WAITED = failure(
    0, 1, "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 10000ms for recv operation"
)
MISSED = failure(
    0, 1, "MissingRanks: waited 60 s for all 2 ranks before all_reduce of 1024 bytes: Ranks 1 failed to pass"
)
ENDED = failure(1, -15, "Signal 15 (SIGTERM) received by PID 4711")
KILLED = failure(1, -9, "Signal 9 (SIGKILL) received by PID 4711")


def test_a_killed_rank_is_to_blame_and_not_the_one_that_lost_it():
    assert blamed_ranks({0: [LOST_PEER], 1: [KILLED]}, 2) == [1]


def test_a_rank_that_hung_says_nothing_and_is_to_blame_for_those_that_waited():
    assert blamed_ranks({0: [WAITED], 1: [ENDED]}, 2) == [1]
    assert blamed_ranks({0: [WAITED], 1: []}, 2) == [1]
    assert blamed_ranks({0: [MISSED], 1: [ENDED]}, 2) == [1]


def test_a_rank_that_hung_in_nccl_is_to_blame_and_not_those_that_its_watchdog_ended():
    aborted = [failure(rank, -6, "Signal 6 (SIGABRT) received by PID 1") for rank in (0, 2, 3)]
    assert blamed_ranks({0: [aborted[0], ENDED], 1: aborted[1:]}, 4) == [1]


def test_a_rank_with_an_error_of_its_own_is_to_blame():
    own = failure(0, 1, "RuntimeError: CUDA error: uncorrectable ECC error encountered")
    assert blamed_ranks({0: [own], 1: [failure(1, 1, LOST_PEER["message"])]}, 2) == [0]


def test_where_nothing_was_recorded_nobody_is_accused():
    assert blamed_ranks({0: [], 1: []}, 2) == []
    assert blamed_ranks({0: [failure(0, -15, "")], 1: [ENDED]}, 2) == []


def test_of_a_node_with_several_ranks_only_the_one_that_said_nothing_is_blamed():
    had_waited = failure(3, -15, "MissingRanks: waited 60 s for all 4 ranks before all_reduce")
    assert blamed_ranks({0: [WAITED, failure(1, 1, WAITED["message"]), failure(2, -15, ""), had_waited]}, 4) == [2]
