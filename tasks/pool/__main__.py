"""The pool's jobs from a shell, whoever started them: look at them, read their logs, end them.

    python -m tasks.pool list                                  the newest attempts of the newest runs
    python -m tasks.pool show latest/train_adapter             state, what it waits for, why it failed, where its files are
    python -m tasks.pool logs latest/train_adapter             every node's lines, live until the job ends
    python -m tasks.pool cancel RUN                            all jobs of a run, or RUN/STAGE; gone when it returns
    python -m tasks.pool render finetune/poc --backend slurm   what would be submitted, exactly

A job is named run/stage, or run/stage/attempt for an older attempt; `latest` is the newest run. Exit status: 0, 1 the job
shown has failed, 2 there is no such job or the settings cannot be used.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tasks.contracts.attempt import read_progress
from tasks.contracts.deployments import deployment_values
from tasks.contracts.files import read_json
from tasks.contracts.job import JobState, PoolError
from tasks.contracts.overrides import SettingsError, apply_overrides, read_experiment
from tasks.contracts.run_folder import STAGES
from tasks.pool.attempts import state_left_behind
from tasks.pool.on_disk import JobOnDisk, NoSuchJob, all_runs, find_jobs, jobs_of_run
from tasks.pool.render import job_of, rendered
from tasks.pool.torchrun_files import HOST

NUM_RUNS = 10


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    storage = Path(arguments.storage).expanduser().resolve()
    try:
        if arguments.command == "list":
            return _list(storage, arguments.runs, every_attempt=arguments.all)
        if arguments.command == "render":
            return _render(arguments)
        jobs = find_jobs(storage, arguments.job)
        if arguments.command == "cancel":
            return _cancel(jobs)
        if arguments.command == "logs":
            return _logs(_one(jobs), arguments.node)
        return _show(_one(jobs))
    except (NoSuchJob, SettingsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PoolError as error:
        print(f"error: the scheduler says: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # `| head` has seen enough.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def _list(storage: Path, num_runs: int, *, every_attempt: bool) -> int:
    runs = all_runs(storage)
    if not runs:
        print(f"no runs in {storage}; --storage names another folder")
        return 0
    rows = [("JOB", "STATE", "PROGRESS", "NODES", "POOL", "STARTED")]
    for run in runs[-num_runs:]:
        for job in jobs_of_run(storage, run, every_attempt=every_attempt):
            spec = read_json(job.path / "spec.json")
            progress = read_progress(job.path)
            rows.append(
                (
                    job.name,
                    _state_of(job).value,
                    f"{progress.done}/{progress.total} {progress.unit}" if progress else "",
                    f"{spec['num_nodes']} x {spec['processes_per_node']}",
                    job.backend,
                    _when(job.path / "spec.json"),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if len(runs) > num_runs:
        print(f"({len(runs) - num_runs} older runs: --runs {len(runs)})")
    return 0


def _state_of(job: JobOnDisk) -> JobState:
    """What the job left of its end, so that a scheduler is asked of living ones only; a preempted one may be requeued."""
    ended = state_left_behind(job.path)
    return job.pool.state(job.handle) if ended in (None, JobState.PREEMPTED) else ended


def _show(job: JobOnDisk) -> int:
    spec = read_json(job.path / "spec.json")
    state = job.pool.state(job.handle)
    gpus = "one GPU each" if spec["gpus"] else "on CPUs"
    lines = [
        ("job", job.name),
        ("state", state.value),
        ("waits for", job.pool.explain(job.handle) or ""),
        ("pool", job.backend),
        ("width", f"{spec['num_nodes']} nodes x {spec['processes_per_node']} processes, {gpus}"),
        ("program", f"torchrun -m {spec['module']} {job.path / 'spec.json'}"),
        ("started", _when(job.path / "spec.json")),
        ("hosts", ", ".join(_hosts(job, spec["num_nodes"]))),
    ]
    if (progress := read_progress(job.path)) is not None:
        lines.append(("progress", f"{progress.done} of {progress.total} {progress.unit}"))
    if (job.path / "handle.json").exists():
        lines.append(("scheduler", ", ".join(f"{k} {v}" for k, v in read_json(job.path / "handle.json").items() if v)))
    lines += [("log", str(path)) for path in sorted(job.path.glob("node-*.log"))]
    for name, value in lines:
        if value:
            print(f"{name:<10} {value}")
    error = job.pool.error(job.handle)
    if error is not None:
        print(f"\n{error.summary}")
        if error.traceback:
            print(error.traceback.rstrip())
        else:
            print("\n".join(f"[node {line.node}] {line.text}" for line in error.last_lines))
    return 1 if state in (JobState.FAILED, JobState.PREEMPTED) else 0


def _logs(job: JobOnDisk, node: int | None) -> int:
    for line in job.pool.logs(job.handle):
        if line is not None and node in (None, line.node):
            print(line.text if node is not None else f"[node {line.node}] {line.text}", flush=True)
    return 0


def _cancel(jobs: Sequence[JobOnDisk]) -> int:
    for job in jobs:
        before = job.pool.state(job.handle)
        if before.is_final:
            print(f"{job.name}: {before.value} already")
            continue
        job.pool.cancel(job.handle)
        print(f"{job.name}: was {before.value}, now {job.pool.state(job.handle).value}")
    return 0


def _render(arguments: argparse.Namespace) -> int:
    values = apply_overrides(deployment_values(arguments.deployment), arguments.set)
    experiment = read_experiment(values)
    experiment = experiment.model_copy(update={"storage": experiment.storage.resolved()})
    job = job_of(experiment, arguments.run, arguments.stage)
    print(rendered(experiment, job, arguments.backend, write=arguments.write), end="")
    return 0


def _one(jobs: Sequence[JobOnDisk]) -> JobOnDisk:
    if len(jobs) > 1:
        raise NoSuchJob(f"which of them? {', '.join(job.name for job in jobs)}")
    return jobs[0]


def _hosts(job: JobOnDisk, num_nodes: int) -> list[str]:
    paths = [job.path / HOST.format(node=node) for node in range(num_nodes)]
    return [f"{read_json(path)['host']} (node {node})" for node, path in enumerate(paths) if path.exists()]


def _when(path: Path) -> str:
    return f"{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", default="storage", help="the runs' shared folder (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="jobs of the newest runs")
    listing.add_argument("--runs", type=int, default=NUM_RUNS, help="how many runs (default: %(default)s)")
    listing.add_argument("--all", action="store_true", help="every attempt, not only the newest")
    for name, text in (("show", "one job"), ("logs", "its nodes' lines, live"), ("cancel", "end it, or all of a run")):
        command = commands.add_parser(name, help=text)
        command.add_argument("job", help="run/stage, run/stage/attempt, or run")
        if name == "logs":
            command.add_argument("--node", type=int, help="this node's lines only")
    render = commands.add_parser("render", help="what would be submitted")
    render.add_argument("deployment", help="finetune/poc, for example")
    render.add_argument("--backend", choices=["slurm", "kubernetes", "torchrun"], required=True)
    render.add_argument("--stage", choices=STAGES, default="train_adapter", help="(default: %(default)s)")
    render.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting; repeatable")
    render.add_argument(
        "--run", default="by-hand", help="name of the run, your own with --write (default: %(default)s)"
    )
    render.add_argument("--write", action="store_true", help="also write the spec that the lines name, to run them")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
