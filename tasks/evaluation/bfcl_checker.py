"""BFCL's own checker, as the package bfcl-eval ships it. It is given calls that we have parsed; nothing is executed.

Its module imports the clients of every model vendor only to ask one thing of the model's name: whether dots in function
names were replaced. None were here, so a module that says so stands in for it while the checker is imported.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

from tasks.contracts.conversation import Call
from tasks.dataset.bfcl import BfclRow

MODEL = "ours"
MODEL_CONFIG = "bfcl_eval.constants.model_config"


def check(row: BfclRow, calls: Sequence[Call]) -> bool | None:
    """Whether the checker takes these calls for right; None where it fails itself."""
    checker, python = _checker()
    output = [{call.name: dict(call.arguments)} for call in calls]
    try:
        verdict = checker([*row.functions], output, row.ground_truth, python, row.category, MODEL)
    except Exception:  # It fails in many ways of its own, on row live_multiple_121-46-0 on whatever it is given.
        return None
    return bool(verdict["valid"])


@cache
def _checker() -> tuple[Callable[..., dict[str, Any]], Any]:
    stand_in = ModuleType(MODEL_CONFIG)
    stand_in.MODEL_CONFIG_MAPPING = {MODEL: SimpleNamespace(underscore_to_dot=False)}  # type: ignore[attr-defined]
    before = sys.modules.get(MODEL_CONFIG)
    sys.modules[MODEL_CONFIG] = before or stand_in
    try:
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    finally:
        if before is None:
            del sys.modules[MODEL_CONFIG]
    return ast_checker, Language.PYTHON
