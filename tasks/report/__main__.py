"""Reports of finished runs.

    python -m tasks.report compare RUN RUN ...          several runs in one page: verdicts, figures, what differs
    python -m tasks.report schema                       the JSON Schema of comparison.json

A RUN is the name of a run in the storage folder, or the path of a comparison.json.
"""

import argparse
import json
import sys
from pathlib import Path

from tasks.contracts.files import write_json, write_text
from tasks.report.compare_runs import compare_runs, runs_as_json, runs_markdown, runs_page
from tasks.report.document import NotAReport, ReportDocument, json_schema, read_document


def main() -> int:
    arguments = _parse()
    if arguments.command == "schema":
        print(json.dumps(json_schema(), indent=2, sort_keys=True))
        return 0
    try:
        documents = [_document(name, Path(arguments.storage)) for name in arguments.runs]
        comparison = compare_runs(documents)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = Path(arguments.output or Path(arguments.storage) / "reports" / "-".join(d.run for d in documents)[:120])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "runs.json", runs_as_json(comparison))
    write_text(folder / "runs.md", runs_markdown(comparison))
    write_text(folder / "runs.html", runs_page(comparison))
    print(runs_markdown(comparison))
    print(f"report: {(folder / 'runs.html').resolve()}")
    return 0


def _document(name: str, storage: Path) -> ReportDocument:
    path = Path(name)
    if path.suffix == ".json":
        return read_document(path)
    runs = storage / "runs"
    if not (runs / name).is_dir():
        known = sorted(p.parts[-3] for p in runs.glob("*/report/comparison.json") if p.parts[-3] != "latest")
        raise NotAReport(
            f"no run {name!r} in {runs}; finished ones: {', '.join(known) or 'none'} (--storage names the folder)"
        )
    return read_document(runs / name / "report" / "comparison.json")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="several finished runs in one page")
    compare.add_argument("runs", nargs="+", metavar="RUN")
    compare.add_argument("--storage", default="storage", help="the runs' storage.shared (default: storage)")
    compare.add_argument("--output", help="folder to write to (default: <storage>/reports/<runs>)")
    commands.add_parser("schema", help="the JSON Schema of comparison.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
