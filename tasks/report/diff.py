"""What differs between an expected and a given call, marked word by word, as HTML."""

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from markupsafe import Markup, escape

MAX_CHARACTERS = 3000
"""Comparing takes time by the product of both lengths; longer texts are shown without marks."""
MARKS = {"del": Markup("<del>{}</del>"), "ins": Markup("<ins>{}</ins>")}
WORD = re.compile(r"\w+|\s+|[^\w\s]")


def marked(expected: str, given: str) -> tuple[Markup, Markup]:
    """Both texts, escaped; what only the first has in ``<del>``, what only the second has in ``<ins>``.

    Calls stand one a line and in any order: each line is compared with the other side's line that is most like it.
    """
    if len(expected) > MAX_CHARACTERS or len(given) > MAX_CHARACTERS:
        return escape(expected), escape(given)
    left, right = expected.split("\n"), given.split("\n")
    partners = _partners(left, right)
    ours = [_line(line, right[partners[i]] if i in partners else "", "del") for i, line in enumerate(left)]
    back = {partner: i for i, partner in partners.items()}
    theirs = [_line(line, left[back[i]] if i in back else "", "ins") for i, line in enumerate(right)]
    return Markup("\n").join(ours), Markup("\n").join(theirs)


def _partners(left: Sequence[str], right: Sequence[str]) -> dict[int, int]:
    """Which line of ``right`` each of ``left`` goes with, most alike first."""
    likeness = sorted(
        ((SequenceMatcher(None, a, b, autojunk=False).quick_ratio(), -i, -j) for i, a in enumerate(left[:20])
         for j, b in enumerate(right[:20])),
        reverse=True,
    )  # fmt: skip
    found: dict[int, int] = {}
    for _, i, j in likeness:
        if -i not in found and -j not in found.values():
            found[-i] = -j
    return found


def _line(text: str, other: str, tag: str) -> Markup:
    return Markup("").join(_pieces(text, other, tag))


def _pieces(text: str, other: str, tag: str) -> Iterator[Markup]:
    words, others = WORD.findall(text), WORD.findall(other)
    for kind, start, end, _, _ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        piece = "".join(words[start:end])
        if piece:
            yield escape(piece) if kind == "equal" else MARKS[tag].format(piece)
