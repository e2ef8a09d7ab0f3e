"""The report: self-contained, and safe whatever a model writes."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.measurements import Measurements, ModelSpeed, StageTime
from tasks.contracts.prediction import Prediction, Reading
from tasks.contracts.settings import GateSettings
from tasks.dataset.quality import Quality
from tasks.evaluation.compare import against_champion, compare
from tasks.report.build import ReportInputs, build_report
from tasks.report.compare_runs import compare_runs, runs_markdown, runs_page
from tasks.report.diff import marked
from tasks.report.document import NotAReport, as_json, json_schema, read_document

REPOSITORY = Path(__file__).resolve().parents[2]

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> | `rm` \n# heading"
SLICES = ("train", "test", "unseen_tools")
# Made by what writes it, so that the page cannot fall behind it unnoticed.
QUALITY = Quality(
    read=3,
    rejected=Counter({"bad_call": 1}),
    left_out={},
    repairs=Counter(),
    sources={},
    written=Counter({"train": 1, "test": 1}),
    lengths={name: np.array([7]) for name in SLICES},
    overlap={"words": 8, "exact_duplicates": 0, "test": 0.25, "unseen_tools": 0.0},
    notes=["9 of dataset.num_test_rows=10"],
).as_json()
TRAINING = {
    "total_steps": 10,
    "world_size": 2,
    "trainable_parameters": 1000,
    "final_loss": 0.5,
    "tokens_per_s_per_gpu": 100.0,
    "peak_memory_gbytes": 1.5,
}
MEASURED = Measurements(
    stages=(StageTime("prepare_dataset", 0, 1, False, 0, True), StageTime("train_adapter", 90, 2, False, 1, True)),
    wall_hours=0.1,
    process_hours=0.05,
    storage_gbytes=0.3,
    final_loss=0.5,
    has_final_checkpoint=True,
    num_out_of_memory=0,
    original=ModelSpeed(40.0, {"p50": 1.0, "p95": 2.0, "p99": 2.5}, 1.2, 2.5, 3.0, 0),
    finetuned=ModelSpeed(38.0, None, 1.3, 0.2, 3.1, 0),
)


@pytest.fixture
def folder(tmp_path):
    call = Call("f", {"a": 1})
    tests = [
        Example("1", (Message("user", HOSTILE),), (), (call,), "", "s", "test"),
        Example("2", (Message("user", "plain"),), (), (), "no", "s", "test"),
    ]
    original = [Prediction(e.id, HOSTILE, Reading(()), Reading(()), 1, 1, False, 1) for e in tests]
    finetuned = [Prediction(e.id, "x", Reading(e.expected), Reading(e.expected), 1, 1, False, 1) for e in tests]
    comparison = compare(tests, original, finetuned, GateSettings(min_requests=1), MEASURED)
    inputs = ReportInputs(
        run="run",
        model="model",
        dataset="rows",
        quality=QUALITY,
        training=TRAINING,
        points=[(1, {"train/loss": 1.0, "train/tokens_per_s_per_gpu": 90.0}), (2, {"train/loss": 0.5})],
        provenance={"settings": {"x": 1}},
        measured=MEASURED,
        champion=against_champion(tests, original, finetuned, f"{HOSTILE} version 2"),
    )
    build_report(comparison, inputs, tmp_path / "report")
    return tmp_path / "report"


def test_the_page_is_self_contained_and_runs_nothing_that_a_model_wrote(folder):
    page = (folder / "comparison.html").read_text()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "The fine-tuned model is not shown (p &lt; 0.05) to be better than the champion, &lt;/pre&gt;" in page
    assert page.count("<script>") == 1
    assert "sharing 8 words in a row with any training request: 25.0% (unseen tools: 0.0%)" in page
    assert "9 of dataset.num_test_rows=10" in page
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", page)
    assert [url for url in loaded if not url.startswith("data:")] == []
    assert "default-src 'none'" in page


def test_the_markdown_cannot_be_broken_out_of(folder):
    text = (folder / "comparison.md").read_text()
    assert "\n# heading" not in text
    assert "| exact" not in text.splitlines()[0]
    assert text.startswith("# FAIL: run")
    assert "champion" in text.splitlines()[4]


def test_json_and_figures_stand_beside_it(folder):
    data = json.loads((folder / "comparison.json").read_text())
    assert data["run"] == "run"
    assert data["groups"][0]["name"] == "needs_call"
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names >= {"exact_match.svg", "train_loss.svg", "train_tokens_per_s_per_gpu.svg"}
    assert not list(folder.parent.glob(".report*"))


def test_what_is_written_fits_the_published_schema_and_reads_back(folder):
    schema = json.loads((REPOSITORY / "docs" / "comparison.schema.json").read_text())
    assert schema == json_schema(), "renew it: python -m tasks.report schema > docs/comparison.schema.json"
    data = json.loads((folder / "comparison.json").read_text())
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data | {"gates": [{"name": "x"}]}, schema)
    document = read_document(folder / "comparison.json")
    assert as_json(document) == data
    (folder / "old.json").write_text('{"passed": true}')
    with pytest.raises(NotAReport, match="is no report of version 1"):
        read_document(folder / "old.json")


def test_differences_are_marked_in_escaped_text_whatever_the_order_of_the_calls():
    expected = '{"name": "f", "arguments": {"a": 1}}\n{"name": "g", "arguments": {"b": "<x>"}}'
    given = '{"name": "g", "arguments": {"b": "<y>"}}\n{"name": "f", "arguments": {"a": 1}}'
    left, right = marked(expected, given)
    assert "<del>x</del>" in left
    assert "<ins>y</ins>" in right
    assert left.count("<del>") == right.count("<ins>") == 1
    assert "&lt;" in left
    long = "[" * 100_000
    assert marked(long, expected)[0] == long


def document(folder, run: str, **changes):
    data = json.loads((folder / "comparison.json").read_text()) | {"run": run} | changes
    (folder / f"{run}.json").write_text(json.dumps(data))
    return read_document(folder / f"{run}.json")


def test_runs_are_paired_on_the_same_requests_and_only_on_those(folder):
    first = document(folder, "first", provenance={"settings": {"a": 1, "b": 2}})
    same = document(folder, "same", provenance={"settings": {"a": 1, "b": 3}})
    examples = [asdict(e) | {"expected": "other"} for e in first.examples]
    other = document(folder, "other", provenance={"settings": {"a": 1, "b": 2}}, examples=examples)
    comparison = compare_runs([first, same, other])
    assert comparison.against_first[1].paired.difference == 0
    assert comparison.against_first[2].paired is None
    assert comparison.differing_settings == {"b": ("2", "3", "2")}
    text = runs_markdown(comparison)
    assert "other test requests than first: not paired" in text
    page = runs_page(comparison)
    assert "3 runs compared" in page
    assert "<script" not in page
    with pytest.raises(NotAReport, match="first is named twice"):
        compare_runs([first, first])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: make tools brings one")
def test_a_browser_opens_the_page_without_a_console_message_and_shows_one_outcome_at_a_time(folder):
    page = folder / "comparison.html"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={folder / 'profile'}", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    # Written by the page's own script: it ran.
    assert "1 shown" in done.stdout
    hidden = re.findall(r'<details class="example" data-kind="([^"]+)"[^>]*hidden', done.stdout)
    assert hidden == ["broken"] or len(hidden) == 1


def test_the_command_compares_runs_by_name_and_lists_those_there_are(folder, tmp_path):
    runs = tmp_path / "storage" / "runs"
    for name in ("one", "two"):
        document(folder, name)
        (runs / name / "report").mkdir(parents=True)
        shutil.copy(folder / f"{name}.json", runs / name / "report" / "comparison.json")
    command = [sys.executable, "-m", "tasks.report", "compare", "--storage", str(tmp_path / "storage")]
    done = subprocess.run([*command, "one", "two"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| | one | two |" in done.stdout
    assert (tmp_path / "storage" / "reports" / "one-two" / "runs.html").stat().st_size > 1000
    missing = subprocess.run([*command, "one", "three"], cwd=REPOSITORY, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "no run 'three'" in missing.stderr
    assert "finished ones: one, two" in missing.stderr
