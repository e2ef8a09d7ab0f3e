"""torchrun's agent: what it prepares on its node before any rank starts."""

import signal

from tasks.pool import torchrun_agent


def test_the_nodes_scratch_is_there_before_a_rank_starts(tmp_path, monkeypatch):
    scratch, seen = tmp_path / "local" / "scratch", []
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "")
    monkeypatch.setattr(torchrun_agent, "torchrun", lambda options: seen.append(scratch.is_dir()))
    handlers = {number: signal.getsignal(number) for number in torchrun_agent.REQUESTS_TO_LEAVE}
    try:
        assert torchrun_agent.main(["agent", str(tmp_path / "node-{node}.failures.json")]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert seen == [True]
