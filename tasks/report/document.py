"""The report as a document for programs: ``comparison.json``, whose JSON Schema is docs/comparison.schema.json.

python -m tasks.report schema > docs/comparison.schema.json
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tasks.contracts.comparison import ChampionFigures, Comparison
from tasks.contracts.measurements import Measurements
from tasks.contracts.suite import SuiteFigures

VERSION = 1
SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True, kw_only=True)
class ReportDocument(Comparison):
    """A comparison with what it was made from.

    Attributes:
        version: of this document's form.
        finished: when, in UTC, ISO 8601.
        training: what the training job left as its result.
        quality: the dataset's quality report.
        provenance: settings, digests and versions.
        suite: a public benchmark that was asked as well.
        champion: the registry's champion, where it was asked the same.
    """

    version: int = VERSION
    run: str
    model: str
    dataset: str
    finished: str
    measured: Measurements
    training: Mapping[str, Any]
    quality: Mapping[str, Any]
    provenance: Mapping[str, Any]
    suite: SuiteFigures | None = None
    champion: ChampionFigures | None = None

    @classmethod
    def of(cls, comparison: Comparison, **values: Any) -> "ReportDocument":
        """The comparison's fields and the others."""
        return cls(**{f.name: getattr(comparison, f.name) for f in fields(Comparison)}, **values)


_ADAPTER = TypeAdapter(ReportDocument)


def as_json(document: ReportDocument) -> Any:
    """The document as JSON values."""
    return _ADAPTER.dump_python(document, mode="json")


def json_schema() -> dict[str, Any]:
    """The JSON Schema that every ``comparison.json`` fits."""
    return {"$schema": SCHEMA_ID, **_ADAPTER.json_schema(mode="serialization")}


class NotAReport(ValueError):
    """The file is no report that this version reads."""


def read_document(path: Path) -> ReportDocument:
    """The document in a ``comparison.json``.

    Raises:
        NotAReport: there is none, or one of another version.
    """
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise NotAReport(f"{path} does not exist: the run has not come to its comparison") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise NotAReport(
            f"{path} is no report of version {VERSION}: {where}: {first['msg']}; run its comparison again "
            "(python -m flows.finetune ... --run NAME resumes a finished run)"
        ) from error
