"""Training on a base in FP8: what is learnt, and who may do so."""

import statistics

import pytest
from pydantic import ValidationError

from tasks.contracts.settings import TrainingSettings
from tests.training.toy import points

pytestmark = pytest.mark.integration


def test_two_ranks_learn_nearly_the_same_from_a_base_in_fp8(toy_job):
    losses = {}
    for fp8 in (False, True):
        job = toy_job(f"fp8-{fp8}", precision="bfloat16", fp8_base=fp8, learning_rate=3e-3)
        attempt = job.start(2)
        assert attempt.wait() == [0, 0], attempt.output()
        losses[fp8] = [point["train/loss"] for point in points(job.folder).values()]
        assert ("14 frozen matrices of the decoder are multiplied in FP8" in attempt.output()) == fp8
        assert (job.output / "adapter" / "adapter_model.safetensors").exists()
    # Another base by a little. The toy is a hard case: rounding of 32 numbers hardly averages out, and a step is 40 tokens.
    assert losses[True] != losses[False]
    assert statistics.mean(losses[True]) == pytest.approx(statistics.mean(losses[False]), rel=0.03)
    assert losses[True] == pytest.approx(losses[False], rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "fsdp"}, "fp8_base=true goes with strategy=ddp only, not fsdp"),
        ({"precision": "float32"}, "fp8_base=true needs precision=bfloat16 or auto, not float32"),
    ],
)
def test_settings_that_cannot_be_say_why(changes, message):
    with pytest.raises(ValidationError, match=message):
        TrainingSettings(fp8_base=True, **changes)
