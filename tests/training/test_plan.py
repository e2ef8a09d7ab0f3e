"""Runs that cannot teach are refused before any GPU is asked for."""

import pytest

from tasks.contracts.settings import TrainingSettings
from tasks.training.plan import plan_training


def settings(**changes):
    values = {"global_batch_size": 32, "per_device_batch_size": 2, "warmup_steps": 10, "save_every_steps": 50}
    return TrainingSettings(**(values | changes))


def test_the_plan_keeps_the_global_batch():
    plan = plan_training(settings(global_batch_size=512), num_rows=112_000, world_size=16)
    assert plan.world_size * plan.per_device_batch_size * plan.accumulation_steps == 512
    assert plan.accumulation_steps == 16
    assert plan.total_steps == 218


def test_an_epoch_ends_at_its_step_limit():
    plan = plan_training(settings(num_epochs=3, max_steps_per_epoch=1000), num_rows=1_000_000, world_size=16)
    assert plan.total_steps == 3000


@pytest.mark.parametrize(
    ("changes", "num_rows", "world_size", "message"),
    [
        # The reference's numbers on the 1,500-row subset: nine steps, all of them warm-up.
        ({"global_batch_size": 512, "warmup_steps": 100, "num_epochs": 3}, 1500, 16, "warmup_steps=100 is 1667%"),
        ({"warmup_steps": 20}, 3200, 16, "use at most 10"),
        ({"global_batch_size": 40}, 3200, 16, "use 32 or 48"),
        ({"per_device_batch_size": 3, "global_batch_size": 64}, 3200, 16, "use one of 1, 2, 4"),
        ({"log_every_steps": 200, "warmup_steps": 0}, 3200, 16, "would log nothing"),
        ({"save_every_steps": 500, "warmup_steps": 0}, 3200, 16, "would save no checkpoint"),
        ({"warmup_steps": 0}, 20, 16, "do not fill one global batch"),
    ],
)
def test_settings_that_cannot_teach_say_what_would(changes, num_rows, world_size, message):
    with pytest.raises(ValueError, match=message.replace("%", r"\%")):
        plan_training(settings(**changes), num_rows=num_rows, world_size=world_size)


def test_every_problem_of_a_plan_is_reported_at_once():
    with pytest.raises(ValueError) as caught:
        plan_training(
            settings(warmup_steps=50, log_every_steps=200, save_every_steps=300), num_rows=3200, world_size=16
        )
    assert len(str(caught.value).splitlines()) == 3
