"""Calls as Python would write them, ``[get_weather(place="Oslo"), Market Trends API(n=1)]``: parsed, never evaluated.

Names may hold spaces and signs (ToolACE), so a call is not Python as it stands: its name is read off, and its arguments
are parsed as literals.
"""

import ast
import io
import itertools
import keyword
import re
import tokenize
from typing import Any

from tasks.contracts.conversation import Call
from tasks.dataset.sources.literals import MAX_LITERAL_CHARACTERS, literal_node

KEPT = "_keyword_"
KEYWORD_ARGUMENT = re.compile(rf"\b({'|'.join(keyword.kwlist)})\s*=")
CLOSING = {"(": ")", "[": "]", "{": "}"}


def read_python_calls(text: str) -> tuple[Call, ...]:
    """The calls in a list of them.

    Args:
        text: with its outer brackets.

    Raises:
        ValueError: it is not closed, or an argument is no literal.
    """
    body, calls, position = text[1:-1], [], 0
    while position < len(body):
        opening = body.find("(", position)
        if opening < 0:
            raise ValueError(f"not a call: {body[position : position + 120]!r}")
        end = _end(body, opening)
        calls.append(Call(body[position:opening].strip(), _arguments(body[opening : end + 1])))
        rest = body[end + 1 :].lstrip()
        if rest and not rest.startswith(","):
            raise ValueError(f"a comma is missing before {rest[:120]!r}")
        position = len(body) - len(rest) + 1 if rest else len(body)
    return tuple(calls)


def _end(text: str, opening: int) -> int:
    """Where the bracket that opens at ``opening`` closes; brackets inside strings do not count."""
    open_brackets, quote, position = [], "", opening
    while position < len(text):
        sign = text[position]
        if quote:
            if sign == "\\":
                position += 1
            elif sign == quote:
                quote = ""
        elif sign in "\"'":
            quote = sign
        elif sign in CLOSING:
            open_brackets.append(CLOSING[sign])
        elif open_brackets and sign == open_brackets[-1]:
            open_brackets.pop()
            if not open_brackets:
                return position
        position += 1
    raise ValueError(f"never closed: {text[opening : opening + 120]!r}")


def _arguments(text: str) -> dict[str, Any]:
    """``(a=1, b=[true])`` as a mapping."""
    try:
        if len(text) > MAX_LITERAL_CHARACTERS:
            raise ValueError(f"{len(text)} characters are too many for one call")
        call = ast.parse(f"_{_keywords_as_names(text)}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(argument.arg is None for argument in call.keywords):
            raise ValueError("arguments must have names")
        return {str(argument.arg).removeprefix(KEPT): literal_node(argument.value) for argument in call.keywords}
    except (ValueError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(f"{error}: {text[:120]!r}") from error


def _keywords_as_names(text: str) -> str:
    """Arguments that are called as Python's own words, ``from="EUR"``, under names that Python lets one give."""
    if not KEYWORD_ARGUMENT.search(text):
        return text
    changed, end = "", 0
    tokens = list(tokenize.generate_tokens(io.StringIO(text.replace("\n", " ")).readline))
    for token, following in itertools.pairwise(tokens):
        if token.type == tokenize.NAME and keyword.iskeyword(token.string) and following.string == "=":
            changed += text[end : token.start[1]] + KEPT
            end = token.start[1]
    return changed + text[end:]
