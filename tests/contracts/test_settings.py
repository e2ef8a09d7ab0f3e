"""Settings: what is refused, all at once, with the next step."""

import pytest

from tasks.contracts.overrides import SettingsError, apply_overrides, read_experiment
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment, StorageSettings

VALUES = {"model": {"name": "embedded"}, "dataset": {"sources": "embedded", "max_rows": 300}}


def test_model_and_dataset_have_no_default():
    with pytest.raises(SettingsError) as caught:
        read_experiment({})
    assert "model: has no default" in str(caught.value)
    assert "dataset: has no default" in str(caught.value)


def test_every_problem_is_reported_at_once():
    values = apply_overrides(VALUES, ["training.learning_rate=7", "training.num_epochs=0"])
    values["training"]["epochs"] = 3
    with pytest.raises(SettingsError) as caught:
        read_experiment(values)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any("training.learning_rate=7" in line and "less than 1" in line for line in lines)
    assert any("training.num_epochs=0" in line for line in lines)
    assert any("training.num_epochs?" in line for line in lines)


def test_an_assignment_changes_one_value_and_leaves_the_others():
    values = {**VALUES, "training": {"num_epochs": 3, "lora": {"rank": 8, "alpha": 4}}}
    experiment = read_experiment(apply_overrides(values, ["training.lora.rank=64", "training.learning_rate=1e-3"]))
    assert experiment.training.lora.rank == 64
    assert experiment.training.lora.alpha == 4
    assert experiment.training.num_epochs == 3
    assert experiment.training.learning_rate == 0.001
    assert values["training"]["lora"]["rank"] == 8


def test_parts_of_a_group_that_is_empty_so_far_can_be_set_one_by_one():
    vllm = ["inference.engine=vllm", "inference.vllm.python=/opt/vllm/bin/python", "inference.vllm.max_concurrency=16"]
    experiment = read_experiment(apply_overrides(VALUES, vllm))
    assert (experiment.inference.vllm.python, experiment.inference.vllm.max_concurrency) == ("/opt/vllm/bin/python", 16)
    whole = ["inference.engine=vllm", "inference.vllm={python: /opt/vllm/bin/python, max_concurrency: 16}"]
    assert read_experiment(apply_overrides(VALUES, whole)) == experiment


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.num_epoch=2", "did you mean training.num_epochs?"),
        ("training", "not an assignment"),
        ("nothing.at.all=1", "unknown setting"),
        ("training.lora=3", "is a group of settings"),
        ("training.num_epochs.x=3", "has no parts"),
        ("inference.vllm.pyton=/opt/vllm/bin/python", "did you mean inference.vllm.python?"),
    ],
)
def test_an_assignment_that_means_nothing_is_refused(override, message):
    with pytest.raises(SettingsError, match=message.replace("?", r"\?")):
        apply_overrides(VALUES, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pool.slurm.env={HF_TOKEN: hf_x}", "export them where the flow runs and name them in pool.slurm.forward_env"),
        ("pool.slurm.env={AWS_ACCESS_KEY_ID: hf_x}", "name them in pool.slurm.forward_env"),
        ("pool.slurm.setup=['module load cuda', 'export HF_TOKEN=hf_x']", "name them in pool.slurm.forward_env"),
        ("pool.slurm.directives=['--export=PATH,WANDB_API_KEY=hf_x']", "name them in pool.slurm.forward_env"),
        ("pool.kubernetes.env={HF_TOKEN: hf_x}", "name those in pool.kubernetes.secret_env"),
        ("pool.kubernetes.secret_env={HF_TOKEN: hf_x}", "pool.kubernetes.secret_env.HF_TOKEN: "),
        ("pool.kubernetes.secret_env=hf_x", "pool.kubernetes.secret_env: "),
        ("pool.slurm.env=[{HF_TOKEN: hf_x}]", "pool.slurm.env: "),
        ("pool.slurm.setup=export HF_TOKEN=hf_x", "pool.slurm.setup: "),
        ("pool.kubernetes.secret_env.HF_TOKEN:hf_x", "is not an assignment"),
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_quoted(override, said):
    with pytest.raises(SettingsError) as caught:
        read_experiment(apply_overrides(VALUES, [override]))
    assert said in str(caught.value)
    assert "hf_x" not in str(caught.value)


def test_pydantics_own_message_does_not_quote_what_was_given():
    with pytest.raises(ValueError, match="secret_env") as caught:
        Experiment.model_validate({**VALUES, "pool": {"kubernetes": {"secret_env": {"HF_TOKEN": "hf_x"}}}})
    assert "hf_x" not in str(caught.value)


def test_every_setting_has_a_description_for_the_form():
    def fields(schema):
        for definition in schema["$defs"].values():
            for name, field in definition["properties"].items():
                if "$ref" not in field and "allOf" not in field:
                    yield definition["title"], name, field

    undescribed = [(m, n) for m, n, field in fields(Experiment.model_json_schema()) if not field.get("description")]
    assert undescribed == [("TrainingSettings", "lora")] or undescribed == []


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", ".hidden", "x" * 64, "a b", "-rf", "a\n"])
def test_a_run_name_cannot_leave_its_folder(name):
    with pytest.raises(ValueError, match="not a usable name"):
        RunFolder(StorageSettings(), name)


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(SettingsError, match="use more than 120"):
        read_experiment({**VALUES, "dataset": {"sources": "embedded", "max_rows": 100, "num_test_rows": 120}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_batch_size", 0),
        ("per_device_batch_size", "many"),
        ("gradient_checkpointing", "maybe"),
        ("gradient_checkpointing", -2),
    ],
)
def test_a_setting_that_may_be_one_thing_or_another_is_told_in_one_line(name, value):
    with pytest.raises(SettingsError) as caught:
        read_experiment({"model": {"name": "embedded"}, "training": {name: value, "num_epochs": 0}})
    first, second = sorted(
        (line for line in str(caught.value).splitlines() if line.startswith("training.")),
        key=lambda line: "num_epochs" in line,
    )
    assert first.startswith(f"training.{name}={value!r}: Input should be")
    assert first.endswith(", or: Input should be 'auto'")
    assert second.startswith("training.num_epochs=0: ")
