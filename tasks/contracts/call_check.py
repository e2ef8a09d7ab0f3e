"""Whether a call fits the tools on offer: JSON Schema, never following a reference out of the schema."""

from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import referencing

from tasks.contracts.by_identity import by_identity
from tasks.contracts.conversation import Call, Tool


class CallProblem(ValueError):
    """What is wrong with a call; ``code`` is the reason that counts are kept by."""

    def __init__(self, code: str, detail: str) -> None:
        self.code, self.detail = code, detail
        super().__init__(f"{code}: {detail}")


def check_call(call: Call, tools: Sequence[Tool]) -> None:
    """Refuse a call to a tool that is not offered, or with arguments that its schema refuses.

    Raises:
        CallProblem: ``undeclared_tool``, ``missing_argument``, ``unknown_argument``, ``schema_mismatch``, or ``bad_tools``
            where the schema itself cannot be used.
    """
    tool = next((tool for tool in tools if tool["name"] == call.name), None)
    if tool is None:
        raise CallProblem("undeclared_tool", f"{call.name} is not among {[t['name'] for t in tools]}")
    schema = tool["parameters"]
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise CallProblem("bad_tools", f"properties of {call.name} are no object: {str(properties)[:120]}")
    if unknown := set(call.arguments) - set(properties):
        raise CallProblem("unknown_argument", f"{call.name} has no parameter {sorted(unknown)}")
    required = schema.get("required", [])
    if isinstance(required, list) and (missing := [n for n in required if n not in call.arguments]):
        raise CallProblem("missing_argument", f"{call.name} needs {missing}")
    try:
        _validator(schema).validate(dict(call.arguments))
    except jsonschema.ValidationError as error:
        raise CallProblem("schema_mismatch", f"{call.name}: {error.message[:200]}") from error
    except Exception as error:  # A broken schema fails in many ways inside the library; each is this row's fault.
        raise CallProblem("bad_tools", f"schema of {call.name}: {type(error).__name__}: {str(error)[:200]}") from error


@by_identity
def _validator(schema: Mapping[str, Any]) -> Any:
    # A registry that knows nothing: a remote "$ref" is an error, never a download.
    return _WithoutPatterns(schema, registry=referencing.Registry())


def _not_checked(*_: Any) -> None:
    """A regular expression out of the data can take hours on a short text, so none is ever run."""


_WithoutPatterns = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator, {"pattern": _not_checked, "patternProperties": _not_checked}
)
