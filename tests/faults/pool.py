"""Does to the pool what happens to clusters, many times, and counts: ``make faults-pool REPEAT=10``.

    python -m tests.faults.pool --repeat 10                     on this machine
    python -m tests.faults.pool --repeat 10 --backend slurm     on the cluster that SLURM_CONF names (make faults-pool)

Each fault is a test of ``tests/pool``, which holds that nothing was lost, nothing ran twice, and the error told is the
cause. Exit status 1 if one failed once.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from tests.conftest import REPOSITORY

FAULTS = {
    "local": {
        "tests/pool/test_local_pool.py": [
            "test_a_killed_rank_is_tried_again_and_an_error_of_the_program_is_not",
            "test_a_lost_node_goes_on_in_a_new_attempt_that_counts_for_nothing",
            "test_ranks_that_are_told_to_leave_save_and_go_on_in_a_new_attempt",
            "test_a_runner_killed_hard_is_a_failure_and_not_success",
            "test_a_flow_killed_hard_leaves_a_job_that_another_adopts",
            "test_a_job_beyond_its_time_limit_is_ended_and_says_so",
            "test_a_node_that_never_comes_is_named_when_the_start_takes_too_long",
            "test_jobs_take_turns_at_the_machine",
            "TestLocalPool::test_the_failing_ranks_own_error_is_shown_and_not_its_peers",
            "TestLocalPool::test_fifty_submits_of_one_name_are_one_job",
        ]
    },
    "slurm": {
        "tests/pool/test_slurm.py": [
            "test_scancel_from_outside_is_a_cancelled_job",
            "test_a_lost_node_requeues_the_job_and_it_ends_well",
            "test_without_another_node_in_time_it_goes_on_with_fewer",
            "test_ranks_that_slurm_tells_to_leave_go_on_in_a_new_attempt",
            "test_a_flow_killed_hard_leaves_a_job_that_another_adopts",
            "test_a_controller_that_restarts_loses_nothing",
            "test_a_full_queue_is_waited_for_and_says_why",
            "test_more_nodes_than_there_are_wait_with_a_reason_and_are_withdrawn",
            "test_a_job_beyond_its_time_limit_says_so",
            "test_a_wrong_partition_is_refused_in_slurms_words_and_nothing_is_left",
            "TestSlurmPool::test_the_failing_ranks_own_error_is_shown_and_not_its_peers",
            "TestSlurmPool::test_fifty_submits_of_one_name_are_one_job",
        ]
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=1, help="times each fault is done (default: %(default)s)")
    parser.add_argument("--backend", choices=sorted(FAULTS), default="local")
    arguments = parser.parse_args()
    tests = [f"{file}::{name}" for file, names in FAULTS[arguments.backend].items() for name in names]
    passed: Counter[str] = Counter()
    began = time.monotonic()
    for number in range(1, arguments.repeat + 1):
        passed.update(_passed(tests))
        done = sum(passed.values())
        print(f"round {number} of {arguments.repeat}: {done} of {number * len(tests)} as they should", flush=True)
    print(f"\n{arguments.backend}, {time.monotonic() - began:.0f} s")
    for test in tests:
        name = test.rpartition("::")[2]
        print(f"{passed[name]:>4} of {arguments.repeat}  {name.removeprefix('test_').replace('_', ' ')}")
    return 0 if sum(passed.values()) == arguments.repeat * len(tests) else 1


def _passed(tests: list[str]) -> list[str]:
    """The names of the tests that passed; what failed is shown, and a skipped one has not passed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "--durations=0",
            f"--junitxml={results}",
            *tests,
        ]
        run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if run.returncode or not results.exists():
            print(run.stdout[-8000:], run.stderr[-2000:], sep="\n", file=sys.stderr)
        cases = list(ET.parse(results).iter("testcase")) if results.exists() else []
    return [
        case.get("name", "") for case in cases if not {child.tag for child in case} & {"failure", "error", "skipped"}
    ]


if __name__ == "__main__":
    sys.exit(main())
