"""A cache for functions of objects that cannot be hashed and are never changed."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")

MAX_OBJECTS = 1024


def by_identity(function: Callable[[Argument], Result]) -> Callable[[Argument], Result]:
    """``function`` computed once per object: the very object, not one that is equal to it.

    The cache holds the objects too, so that none's place in memory is taken by another while its result is kept.
    """
    known: dict[int, tuple[Any, Result]] = {}

    @wraps(function)
    def cached(argument: Argument) -> Result:
        found = known.get(id(argument))
        if found is not None:
            return found[1]
        result = function(argument)
        if len(known) >= MAX_OBJECTS:
            known.clear()
        known[id(argument)] = (argument, result)
        return result

    return cached
