"""What the training program's runs say together."""

import pytest

from tasks.cluster.training_figures import training_figures, work_of_ranks
from tasks.cluster.training_inputs import SHAPES, folders, training_settings
from tasks.contracts.cluster_settings import ClusterCheck
from tasks.training.plan import plan_training


def points(speed: float, losses: list[float]) -> list[tuple[int, dict[str, float]]]:
    # The first steps compile and allocate.
    speeds = [speed / 10, speed / 10, *[speed] * (len(losses) - 2)]
    return [
        (step, {"train/loss": loss, "train/tokens_per_s_per_gpu": s, "train/useful_tflops_per_s_per_gpu": s * 34.2e-3})
        for step, (loss, s) in enumerate(zip(losses, speeds, strict=True), 1)
    ]


LOSSES = [6.0 - 0.1 * i for i in range(8)]


def figures_of(runs, product=None):
    return {figure.name: figure.value for figure in training_figures(runs, product)}


def test_speed_scaling_and_equal_loss():
    runs = {"one": points(15_000, LOSSES), "all": points(14_400, LOSSES), "repeat": points(14_300, LOSSES)}
    figures = figures_of(runs, product=744.0)
    assert figures["training_tokens_per_s_per_gpu"] == 14_400
    assert figures["training_scaling_efficiency"] == pytest.approx(0.96)
    assert figures["training_loss_difference"] == 0
    assert figures["training_share_of_product_rate"] == pytest.approx(14_400 * 34.2e9 / 744e12)


def test_a_loss_that_does_not_repeat_shows_from_where_it_does_not():
    other = [*LOSSES[:5], *[loss + 0.01 for loss in LOSSES[5:]]]
    figures = figures_of({"all": points(1, LOSSES), "repeat": points(1, other)})
    assert figures["training_loss_difference"] == pytest.approx(0.01)
    assert figures["training_first_loss_difference"] == 0


@pytest.mark.parametrize("second", [[*LOSSES[:7], float("nan")], LOSSES[:6]])
def test_a_loss_that_is_none_or_a_run_that_is_shorter_is_no_equal_loss(second):
    figures = figures_of({"all": points(1, LOSSES), "repeat": points(1, second)})
    assert figures["training_loss_difference"] != figures["training_loss_difference"]


def test_what_each_rank_took_for_its_own_part_is_told_by_its_number():
    name = "rank/{:03d}/work_us_per_token"
    whole = [(step, metrics | {name.format(0): 70.0, name.format(1): 80.0}) for step, metrics in points(1, LOSSES)]
    # Of the third nothing is known, which is missing and no zero.
    assert [figure.value for figure in work_of_ranks(whole, 3)] == [70.0, 80.0, None]


def test_a_run_that_did_not_end_has_no_figure():
    figures = figures_of({"one": points(1, LOSSES)})
    assert set(figures) == {"training_one_tokens_per_s_per_gpu"}


def test_every_shape_is_a_run_that_training_takes_at_every_width():
    for shape in SHAPES:
        check = ClusterCheck(training={"shape": shape}, pool={"num_nodes": 2, "processes_per_node": 8})
        rows = int(folders(check)[1].name.rpartition("-")[2])
        for world_size in (1, 8, 16):
            plan = plan_training(training_settings(check, world_size), num_rows=rows, world_size=world_size)
            assert plan.total_steps == check.training.num_steps
            assert plan.accumulation_steps == 1
