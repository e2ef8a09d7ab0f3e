"""Whether a call fits the tools on offer: JSON Schema, never following a reference out of the schema."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jsonschema
import referencing

from tasks.contracts.by_identity import by_identity
from tasks.contracts.conversation import Call, Tool

MAX_SCHEMA_DEPTH = 24
MAX_SCHEMA_PARTS = 2000
MAX_ENUM = 500
MAX_ARGUMENTS_CHARACTERS = 32_000
"""Of a call's arguments as JSON; checking takes time by their product with the schema."""
JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
ANNOTATIONS = {"description", "title", "default", "examples", "format"}
"""Keywords of a schema that refuse nothing; formats are not checked here."""
PLAIN_KEYWORDS = {"type", "properties", "required", "additionalProperties", *ANNOTATIONS}
"""Of those, the ones that refuse are looked after by :func:`check_call` itself."""


class CallProblem(ValueError):
    """What is wrong with a call; ``code`` is the reason that counts are kept by."""

    def __init__(self, code: str, detail: str) -> None:
        self.code, self.detail = code, detail
        super().__init__(f"{code}: {detail}")


def check_call(call: Call, tools: Sequence[Tool]) -> None:
    """Refuse a call to a tool that is not offered, or with arguments that its schema refuses.

    Raises:
        CallProblem: ``undeclared_tool``, ``missing_argument``, ``unknown_argument``, ``schema_mismatch``, or ``bad_tools``
            where the schema itself cannot be used, ``call_too_large``.
    """
    tool = next((tool for tool in tools if tool["name"] == call.name), None)
    if tool is None:
        raise CallProblem("undeclared_tool", f"{call.name} is not among {[t['name'] for t in tools]}")
    schema = tool["parameters"]
    properties = schema.get("properties", {})
    if (size := len(json.dumps(call.arguments))) > MAX_ARGUMENTS_CHARACTERS:
        limit = MAX_ARGUMENTS_CHARACTERS
        raise CallProblem("call_too_large", f"the arguments of {call.name} have {size} characters, at most {limit}")
    if unknown := set(call.arguments) - set(properties):
        raise CallProblem("unknown_argument", f"{call.name} has no parameter {sorted(unknown)}")
    if missing := [name for name in schema.get("required", []) if name not in call.arguments]:
        raise CallProblem("missing_argument", f"{call.name} needs {missing}")
    # What most calls come to: the library takes a tenth of a millisecond to say the same.
    tests = _plain_tests(schema)
    if tests is not None and all(tests[name](value) for name, value in call.arguments.items()):
        return
    try:
        # Not validate(): the error that it raises keeps its callers' variables in memory.
        mismatch = next(_validator(schema).iter_errors(dict(call.arguments)), None)
    except Exception as error:  # A broken schema fails in many ways inside the library; each is this row's fault.
        raise CallProblem("bad_tools", f"schema of {call.name}: {type(error).__name__}: {str(error)[:200]}") from error
    if mismatch:
        raise CallProblem("schema_mismatch", f"{call.name}: {mismatch.message[:200]}")


@by_identity
def _plain_tests(schema: Mapping[str, Any]) -> Mapping[str, Callable[[Any], bool]] | None:
    """For each parameter whether a value surely fits; None where the schema asks for more than names and plain types."""
    properties = schema.get("properties", {})
    if (
        schema.keys() - PLAIN_KEYWORDS
        or schema.get("type", "object") != "object"
        or not isinstance(properties, Mapping)
    ):
        return None
    tests = {name: _plain_test(part) for name, part in properties.items()}
    return {name: test for name, test in tests.items() if test} if all(tests.values()) else None


def _plain_test(schema: Any) -> Callable[[Any], bool] | None:
    if not isinstance(schema, Mapping) or not isinstance(kind := schema.get("type"), str):
        return None
    asked = schema.keys() - {"type", *ANNOTATIONS}
    if kind == "array" and asked == {"items"}:
        of_item = _plain_test(schema["items"])
        return (lambda value: type(value) is list and all(map(of_item, value))) if of_item else None
    enum = schema.get("enum")
    if kind == "string" and isinstance(enum, list) and asked == {"enum"}:
        return lambda value: type(value) is str and value in enum
    types = JSON_TYPES.get(kind)
    return (lambda value: type(value) in types) if types and not asked else None


@by_identity
def _validator(schema: Mapping[str, Any]) -> Any:
    # A registry that knows nothing: a remote "$ref" is an error, never a download.
    return jsonschema.Draft202012Validator(bounded(schema), registry=referencing.Registry())


def bounded(schema: Any) -> Any:
    """The schema without what could take hours to check: regular expressions out of the data, and pairs of items."""
    if isinstance(schema, list):
        return [bounded(entry) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    dropped = {
        "pattern",
        "uniqueItems",
        "unevaluatedProperties",
        "unevaluatedItems",
        "patternProperties",
        "propertyNames",
    }
    if "patternProperties" in schema:
        # It would refuse what only the dropped patterns allow.
        dropped = dropped | {"additionalProperties"}
    kept = {key: value for key, value in schema.items() if key not in dropped}
    # The names of parameters are no keywords.
    named = {"properties", "$defs", "definitions"}
    return {
        key: {name: bounded(part) for name, part in value.items()}
        if key in named and isinstance(value, Mapping)
        else bounded(value)
        for key, value in kept.items()
    }


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse a schema of parameters that is none, or that could take very long to check or to write.

    Raises:
        ValueError: saying what is wrong.
    """
    _Walk(schema).size(schema, 0)


class _Walk:
    """How much work a schema is, with every local reference followed."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._sizes: dict[str, int | None] = {}

    def size(self, schema: Any, depth: int) -> int:
        if not isinstance(schema, Mapping):
            raise ValueError(f"a schema must be an object, got {str(schema)[:80]}")
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"nested deeper than {MAX_SCHEMA_DEPTH}")
        required, enum, type_ = schema.get("required", []), schema.get("enum", []), schema.get("type", "any")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError(f"required must be a list of names, got {str(required)[:80]}")
        if not isinstance(enum, list) or len(enum) > MAX_ENUM:
            raise ValueError(f"enum must be a list of at most {MAX_ENUM}, got {str(enum)[:80]}")
        if not (isinstance(type_, str) or (isinstance(type_, list) and all(isinstance(t, str) for t in type_))):
            raise ValueError(f"type must be a name or a list of names, got {str(type_)[:80]}")
        total = 1 + sum(self.size(part, depth + 1) for part in self._parts(schema))
        if "$ref" in schema:
            total += self._referred(schema["$ref"], depth)
        if total > MAX_SCHEMA_PARTS:
            raise ValueError(f"more than {MAX_SCHEMA_PARTS} parts")
        return total

    def _parts(self, schema: Mapping[str, Any]) -> Iterator[Any]:
        for key in ("properties", "$defs", "definitions"):
            parts = schema.get(key, {})
            if not isinstance(parts, Mapping):
                raise ValueError(f"{key} must be an object, got {str(parts)[:80]}")
            yield from parts.values()
        for key in {"items", "not", "additionalProperties"} & schema.keys():
            # Here the two words for "anything" and "nothing" are common.
            if not (key == "additionalProperties" and isinstance(schema[key], bool)):
                yield schema[key]
        for key in ("allOf", "anyOf", "oneOf"):
            parts = schema.get(key, [])
            if not isinstance(parts, list):
                raise ValueError(f"{key} must be a list, got {str(parts)[:80]}")
            yield from parts

    def _referred(self, reference: Any, depth: int) -> int:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise ValueError(f"$ref may only point into the schema itself, got {str(reference)[:80]}")
        if reference not in self._sizes:
            self._sizes[reference] = None
            target: Any = self._root
            for part in reference[2:].split("/"):
                target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
            self._sizes[reference] = self.size(target, depth + 1)
        size = self._sizes[reference]
        if size is None:
            raise ValueError(f"$ref {reference[:80]} refers to itself")
        return size
