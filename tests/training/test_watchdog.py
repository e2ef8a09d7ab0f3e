"""Who stands still is told from where everyone is."""

from tasks.training.watchdog import Seen, find_hung


def seen(**ranks):
    return {int(name[1:]): Seen(count, place, at, 0.0) for name, (count, place, at) in ranks.items()}


def test_the_rank_behind_the_others_is_the_one_that_hangs():
    ranks = seen(r0=(9, "backward of step 3", 20.0), r1=(8, "forward of step 3", 15.0), r2=(9, "backward", 20.0))
    assert find_hung(ranks, now=74.0, limit_s=60) is None
    problem = find_hung(ranks, now=76.0, limit_s=60)
    assert problem.startswith("rank 1 stands still since")
    assert "(61 s): forward of step 3" in problem


def test_a_rank_that_was_never_heard_of_is_named():
    assert "ranks 1, 2 stand still" in find_hung(
        seen(r0=(3, "forward", 9.0), r1=(-1, "before training", 5.0), r2=(-1, "before training", 5.0)),
        now=70.0,
        limit_s=60,
    )


def test_where_all_are_at_one_place_none_is_accused():
    problem = find_hung(seen(r0=(5, "waiting", 1.0), r1=(5, "waiting", 2.0)), now=90.0, limit_s=60)
    assert "all 2 ranks stand still" in problem
    assert "None is behind" in problem


def test_a_slow_rank_that_moves_is_left_alone():
    assert find_hung(seen(r0=(50, "waiting", 0.0), r1=(2, "forward", 50.0)), now=100.0, limit_s=60) is None
