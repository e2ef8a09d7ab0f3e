"""Text that should be JSON and often is not quite: read as JSON, as a Python literal, or after a documented repair.

Nothing is ever evaluated. What was needed is counted under these names:

=================== ======================================================================
python_literal      single quotes, ``True``, ``None`` (published Hermes rows have them)
literal_newline     a backslash and an ``n`` between tokens instead of a line break
trailing_comma      ``[1, 2,]``
glaive_quoting      a call's arguments as JSON inside single quotes (Glaive v2)
=================== ======================================================================

Two more things that readers leave out are counted with them: ``words_beside_a_call`` (an answer either calls or speaks)
and ``turns_after_the_last_answer`` (nobody answers them, so there is nothing in them to learn).
"""

import ast
import re
from collections import Counter
from typing import Any

from tasks.dataset.rendering.strict_json import STRICT, finite

MAX_LITERAL_CHARACTERS = 200_000
"""Python's parser is asked for no more: it takes much memory per character."""
WORDS = {"true": True, "false": False, "null": None}

Repairs = Counter[str]
"""How often each repair was needed."""

# Strings are matched first and kept, so that only what stands between them is changed; one that is never closed reaches to the
# end, so that no sign is looked at twice.
_OUTSIDE = re.compile(
    r"""("(?:\\.|[^"\\])*+(?:"|\\?\Z)|'(?:\\.|[^'\\])*+(?:'|\\?\Z))|(\\n)|(,)(?=\s*[}\]])""", re.DOTALL
)


def read_value(text: str, repairs: Repairs) -> Any:
    """The JSON value that ``text`` means.

    Raises:
        ValueError: it means none: also for duplicate keys, NaN, and numbers that overflow.
    """
    try:
        return STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        # Its words, not itself: an error that its own function still knows keeps every row around it in memory.
        problem = str(error)
    used: list[str] = []

    def mend(match: re.Match[str]) -> str:
        string, newline, comma = match.groups()
        if newline:
            used.append("literal_newline")
            return "\n"
        if comma:
            used.append("trailing_comma")
            return ""
        return str(string)

    for candidate, is_mended in ((text, False), (text, True)):
        if is_mended:
            candidate = _OUTSIDE.sub(mend, text)
            if not used:
                break
            try:
                value = STRICT.decode(candidate)
            except (ValueError, RecursionError):
                pass
            else:
                repairs.update(set(used))
                return value
        try:
            value = literal(candidate)
        except ValueError:
            continue
        repairs.update({"python_literal", *used})
        return value
    raise ValueError(f"neither JSON nor a literal ({problem}): {text[:120]!r}")


def literal(text: str) -> Any:
    """A Python literal of the types that JSON has, JSON's ``true``, ``false`` and ``null`` included.

    Raises:
        ValueError: it is none.
    """
    if len(text) > MAX_LITERAL_CHARACTERS:
        raise ValueError(f"{len(text)} characters are too many for a literal")
    try:
        return literal_node(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(f"not a literal: {error}") from error


def literal_node(node: ast.expr) -> Any:
    """The value of a parsed literal; raises what :func:`ast.literal_eval` raises."""
    return _as_json(ast.literal_eval(_Words().visit(node)))


class _Words(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(WORDS[node.id]) if node.id in WORDS else node


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return finite(repr(value))
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json(entry) for key, entry in value.items()}
    raise ValueError(f"{type(value).__name__} is no JSON value")
