"""A node that writes without end must not drown the flow's log, and nothing may be left out in silence."""

from tasks.contracts.job import LogLine
from tasks.pool.line_rate import BURST, LINES_PER_S, LineRate


def test_every_line_is_passed_or_counted():
    now, passed = [0.0], []
    rate = LineRate(passed.append, clock=lambda: now[0])
    for number in range(10_000):
        now[0] += 0.001
        rate.take(LogLine(0, f"line {number}"))
    rate.finish()
    told = [line for line in passed if line.text.startswith("line ")]
    left_out = sum(int(line.text.split()[1].replace(",", "")) for line in passed if line.text.startswith("... "))
    assert len(told) + left_out == 10_000
    assert len(told) <= BURST + 10 * LINES_PER_S + 1
    assert "node-0.log" in passed[-1].text


def test_a_node_that_floods_takes_nothing_from_the_others():
    passed = []
    rate = LineRate(passed.append, clock=lambda: 0.0)
    for _ in range(2 * BURST):
        rate.take(LogLine(0, "flood"))
    rate.take(LogLine(1, "rank 1 has a bad value"))
    assert passed[-1] == LogLine(1, "rank 1 has a bad value")
