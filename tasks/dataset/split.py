"""Which rows teach and which test, so that nothing of the test is in the training."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tasks.contracts.conversation import Example, cut_at_first_call
from tasks.contracts.settings import DatasetSettings
from tasks.dataset.sources.rows import Conversation

NGRAM_WORDS = 8


@dataclass
class Split:
    """The slices, and how many rows were left out for which reason."""

    train: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    unseen_tools: list[Example] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count rows that are in no slice."""
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count


def to_example(
    row_id: str, conversation: Conversation, source: str, slice_: Literal["train", "test", "unseen_tools"] = "train"
) -> Example:
    """A conversation as an example of a slice."""
    reply = conversation.reply
    return Example(row_id, conversation.messages, conversation.tools, reply.calls, reply.content, source, slice_)


def split_embedded(examples: Iterable[Example]) -> Split:
    """The embedded rows say themselves where they belong; requests that stand twice are left out of the training."""
    split = Split()
    for example in examples:
        _, _, name, _ = example.id.split("-")
        slice_: Literal["train", "test", "unseen_tools"] = (
            "unseen_tools" if name == "unseen" else "test" if name == "test" else "train"
        )
        getattr(split, slice_).append(_in_slice(example, slice_))
    return _without_duplicates(split)


def split_source(examples: Sequence[Example], settings: DatasetSettings) -> Split:
    """Chosen rows, split by the first request of their conversations and by tools.

    Rows are ordered by a hash of seed and first request: the order depends on the row alone. Rows with one first
    request go to one slice together. Tools are held out one by one, in an order hashed likewise, until their rows
    suffice; rows that offer such a tool are in no other slice.

    Raises:
        ValueError: fewer rows than the settings hold out.
    """
    split = Split()
    ordered = sorted(examples, key=lambda e: (_hash(settings.seed, first_request(e)), e.id))
    if settings.max_rows is not None:
        split.leave_out("beyond max_rows", max(0, len(ordered) - settings.max_rows))
        ordered = ordered[: settings.max_rows]
    held_out = _held_out_tools(ordered, settings)
    rest: list[Example] = []
    for example in ordered:
        names = {tool["name"] for tool in example.tools}
        if not names & held_out:
            rest.append(example)
        elif names <= held_out and len(split.unseen_tools) < settings.num_unseen_tools_rows:
            split.unseen_tools.append(_in_slice(example, "unseen_tools"))
        else:
            split.leave_out("offers a held-out tool")
    test_requests: set[str] = set()
    for example in rest:
        request = first_request(example)
        if request in test_requests or len(split.test) < settings.num_test_rows:
            test_requests.add(request)
            split.test.append(_in_slice(example, "test"))
        else:
            split.train.append(example)
    if not split.train:
        raise ValueError(
            f"{len(examples)} usable rows leave nothing to train on after holding out {settings.num_test_rows} for the "
            f"test and {settings.num_unseen_tools_rows} with unseen tools; lower dataset.num_test_rows or give more rows"
        )
    return _without_duplicates(split)


def shuffle_train(split: Split, seed: int) -> None:
    """Put the training rows in a seeded order, so that categories and tools mix."""
    split.train.sort(key=lambda e: _hash(seed, e.id))


def ngram_overlap(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Share of test requests that have a run of eight words in common with any training request."""
    known = {ngram for example in train for request in requests(example) for ngram in _ngrams(request)}
    if not test:
        return 0.0
    return sum(bool(_ngrams(example.request) & known) for example in test) / len(test)


def normalised(text: str) -> str:
    """A request without case, punctuation and runs of white space."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def requests(example: Example) -> list[str]:
    """Everything the user says in a conversation."""
    return [message.content for message in example.messages if message.role == "user"]


def first_request(example: Example) -> str:
    """The conversation's first user turn, normalised: conversations that share it stay in one slice."""
    return normalised(next((m.content for m in example.messages if m.role == "user"), ""))


def permutation(count: int, seed: int) -> list[int]:
    """A seeded derangement: no position keeps its own."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    target = [0] * count
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        target[here] = there
    return target


def _in_slice(example: Example, slice_: Literal["train", "test", "unseen_tools"]) -> Example:
    return replace(example if slice_ == "train" else cut_at_first_call(example), slice=slice_)


def _without_duplicates(split: Split) -> Split:
    """Each request with its tools once, and no training request that the test asks."""
    seen: set[str] = set()
    for name in ("test", "unseen_tools", "train"):
        kept = []
        for example in getattr(split, name):
            key = (
                " / ".join(map(normalised, requests(example)))
                + "|"
                + ",".join(sorted(t["name"] for t in example.tools))
            )
            if key in seen:
                split.leave_out("duplicate request")
            else:
                seen.add(key)
                kept.append(example)
        setattr(split, name, kept)
    asked = {normalised(example.request) for example in [*split.test, *split.unseen_tools]}
    clean = [example for example in split.train if not asked & set(map(normalised, requests(example)))]
    split.leave_out("test request in training", len(split.train) - len(clean))
    split.train = clean
    return split


def _held_out_tools(examples: Sequence[Example], settings: DatasetSettings) -> set[str]:
    if not settings.num_unseen_tools_rows:
        return set()
    names = sorted({t["name"] for e in examples for t in e.tools}, key=lambda name: _hash(settings.seed, name))
    held_out: set[str] = set()
    for name in names:
        if sum(bool(e.tools) and {t["name"] for t in e.tools} <= held_out for e in examples) >= (
            settings.num_unseen_tools_rows
        ):
            break
        held_out.add(name)
    return held_out


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = normalised(text).split()
    return {tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}
