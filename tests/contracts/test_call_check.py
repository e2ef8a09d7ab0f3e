"""The quick check of a call never says yes where the schema library says no."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.contracts import call_check
from tasks.contracts.call_check import CallProblem, check_call
from tasks.contracts.conversation import Call

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([10**40, 3.0]), st.floats(allow_nan=False), st.text(),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(), st.integers(), max_size=2),
)  # fmt: skip
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["string", "integer", "number", "boolean", "array", "object", "null", "any", ["string"]]),
        "description": st.just("d"),
        "format": st.just("date"),
        "default": VALUES,
        "enum": st.one_of(st.lists(VALUES, max_size=2), st.just(["", "a"])),
        "items": st.sampled_from([{"type": "integer"}, {"type": "string", "enum": ["a"]}, {"minimum": 1}, {}]),
        "minimum": st.integers(-2, 2),
        "minLength": st.just(2),
    },
)  # fmt: skip
SCHEMAS = st.fixed_dictionaries(
    {"properties": st.fixed_dictionaries({"a": PARTS, "b": PARTS})},
    optional={
        "type": st.sampled_from(["object", "string"]),
        "required": st.lists(st.sampled_from("ab"), unique=True),
        "additionalProperties": st.booleans(),
        "minProperties": st.just(2),
        "not": st.just({"required": ["a"]}),
    },
)


def verdict(schema, arguments):
    try:
        check_call(Call("f", arguments), [{"name": "f", "description": "", "parameters": schema}])
    except CallProblem as problem:
        return problem.code
    return "fits"


@given(SCHEMAS, st.dictionaries(st.sampled_from("ab"), VALUES))
@settings(max_examples=1000, deadline=None)
def test_the_quick_check_never_differs_from_the_library(schema, arguments):
    quick = verdict(schema, arguments)
    plain_tests = call_check._plain_tests
    call_check._plain_tests = lambda schema: None
    try:
        assert verdict(schema, arguments) == quick
    finally:
        call_check._plain_tests = plain_tests


def test_the_quick_check_is_what_most_calls_come_to():
    schema = {"type": "object", "properties": {"a": {"type": "string", "description": "d"}}, "required": ["a"]}
    assert call_check._plain_tests(schema)["a"]("x")
    assert verdict(schema, {"a": "x"}) == "fits"
    assert verdict(schema, {"a": 1}) == "schema_mismatch"
