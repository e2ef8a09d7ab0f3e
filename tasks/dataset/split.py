"""Which rows teach and which test, so that nothing of the test is in the training.

Works on the rows' keys alone (:mod:`tasks.dataset.features`). What becomes of a row depends on the seed, on the row and on
rows that are alike, never on how many others there are, except where a limit of the settings is reached:

1. by the hash of the first request to the test or the training side, so that conversations that open alike stay together;
2. tools held out by their names: a row that offers only such tools can become a row of ``unseen_tools``, one that offers
   some of them is in no slice;
3. a source's rows up to its own limit, in the order of another such hash;
4. equal rows, then rows that are nearly equal: the first stays, one of the test side before one of the training side;
5. the tests up to their limits;
6. training rows in which a test request or a benchmark stands are left out, then the training's limit counts.

The keys stay in files; about 100 bytes a row are held while rows are compared.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.contracts.settings import DatasetSettings
from tasks.dataset.benchmarks import Benchmarks
from tasks.dataset.features import Keys, mixed, similarity
from tasks.dataset.ragged import Array, Column, Ragged, any_in

OUT, TRAIN, TEST, UNSEEN_TOOLS = -1, 0, 1, 2
MAX_COMPARED = 16
"""Rows of a group of likely duplicates that each further one is measured against."""
SLICES = {"train": TRAIN, "test": TEST, "unseen_tools": UNSEEN_TOOLS}

EXACT = "exact_duplicate"
NEAR = "near_duplicate"
HELD_OUT_TOOL = "offers_a_held_out_tool"
BEYOND_SOURCE = "beyond_the_source's_max_rows"
BEYOND_TEST = "test_side_beyond_num_test_rows"
BEYOND_UNSEEN = "beyond_num_unseen_tools_rows"
BEYOND_MAX = "beyond_max_rows"
BEYOND_WEIGHT = "beyond_the_source's_weight"
ASKED_IN_TEST = "test_request_in_training"
SHARES_TEST = "shares_words_with_the_test"
SHARES_BENCHMARK = "shares_words_with_a_benchmark"
REASONS = (
    EXACT, NEAR, HELD_OUT_TOOL, BEYOND_SOURCE, BEYOND_TEST, BEYOND_UNSEEN, BEYOND_MAX, BEYOND_WEIGHT, ASKED_IN_TEST,
    SHARES_TEST, SHARES_BENCHMARK,
)  # fmt: skip
NONE = -1


@dataclass(frozen=True)
class Keyed:
    """The keys of all usable rows, in the order in which they were read.

    Attributes:
        source: index of the row's source.
        fixed: the slice that the source itself gives, or OUT.
        opening: key of the first request.
        exact: key of all requests, the tools' names and the calls.
        offered: key of the tools' names.
        bands: MinHash, a column a band.
        tools: keys of the tools on offer.
        requests: keys of everything the user says; ``asked``: of what a test would ask.
        shingles, word_runs: keys of runs of words.
    """

    source: Column
    fixed: Column
    opening: Column
    exact: Column
    offered: Column
    bands: Sequence[Column]
    tools: Ragged
    requests: Ragged
    asked: Ragged
    shingles: Ragged
    word_runs: Ragged


@dataclass
class Choice:
    """What became of the rows: their slice, or why they are in none.

    Attributes:
        slice: TRAIN, TEST, UNSEEN_TOOLS or OUT, [rows].
        why: the place in REASONS of why a row is OUT, or NONE, [rows].
        like: the row that a duplicate is like, or the test row that a training row has words in common with, or NONE, [rows].
    """

    slice: npt.NDArray[np.int8]
    why: npt.NDArray[np.int8]
    like: npt.NDArray[np.int64]

    def leave_out(self, rows: Sequence[int] | Array, reason: str) -> None:
        """Take rows out of their slice."""
        self.slice[rows] = OUT
        self.why[rows] = REASONS.index(reason)

    @property
    def counts(self) -> dict[str, int]:
        """Rows left out by reason."""
        return self.counts_in(np.ones(len(self.why), bool))

    def counts_in(self, chosen: npt.NDArray[np.bool_]) -> dict[str, int]:
        """Rows left out by reason, of the chosen ones."""
        counts = np.bincount(self.why[chosen & (self.why != NONE)], minlength=len(REASONS)).tolist()
        return {reason: count for reason, count in sorted(zip(REASONS, counts, strict=True)) if count}


def choose(rows: Keyed, settings: DatasetSettings, benchmarks: Benchmarks) -> Choice:
    """The slice of every row.

    Raises:
        ValueError: a source with a weight has no rows.
    """
    seed = settings.seed
    opening, fixed = rows.opening.read(), rows.fixed.read()
    order = _hashed(opening, seed, "order")
    slice_ = np.where(_uniform(opening, seed, "side") < settings.test_share, TEST, TRAIN).astype(np.int8)
    slice_ = np.where(fixed == OUT, slice_, fixed)
    del opening
    choice = Choice(slice_, np.full(len(slice_), NONE, np.int8), np.full(len(slice_), NONE, np.int64))
    _hold_out_tools(rows, fixed, settings, choice)
    for index, source in enumerate(settings.sources):
        if source.max_rows is not None:
            of_source = np.flatnonzero((choice.slice != OUT) & (rows.source.read() == index))
            of_source = _in_order(of_source, order, fixed)
            choice.leave_out(of_source[source.max_rows :], BEYOND_SOURCE)
    _drop_duplicates(rows, settings, choice, order)
    for name, limit, reason in (
        (TEST, settings.num_test_rows, BEYOND_TEST),
        (UNSEEN_TOOLS, settings.num_unseen_tools_rows, BEYOND_UNSEEN),
    ):
        choice.leave_out(_in_order(np.flatnonzero(choice.slice == name), order)[limit:], reason)
    _decontaminate(rows, settings, choice, benchmarks)
    _limit_training(rows, settings, choice, order)
    return choice


def check_not_empty(choice: Choice, settings: DatasetSettings) -> None:
    """Raise ValueError if there is nothing to train on, or nothing to test with."""
    sizes = {name: int((choice.slice == code).sum()) for name, code in SLICES.items()}
    if not sizes["train"] or not sizes["test"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in choice.counts.items()) or "none"
        raise ValueError(
            f"{len(choice.slice)} usable rows leave {sizes['train']} to train on and {sizes['test']} to test with (left out: "
            f"{counts}); give more rows, or change dataset.test_share={settings.test_share:g}"
        )


def shuffle_keys(ids: Sequence[str], seed: int) -> Keys:
    """Keys that sort rows into a seeded order, so that categories and tools mix, [ids]."""
    digests = (hashlib.sha256(f"{seed}\0{id_}".encode()).digest() for id_ in ids)
    return np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64, len(ids))


def permutation(count: int, seed: int) -> list[int]:
    """A seeded derangement: no position keeps its own."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    target = [0] * count
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        target[here] = there
    return target


def _hold_out_tools(rows: Keyed, fixed: Array, settings: DatasetSettings, choice: Choice) -> None:
    fixed_unseen = [rows.tools[row] for row in np.flatnonzero(fixed == UNSEEN_TOOLS).tolist()]
    of_unseen = np.unique(np.concatenate(fixed_unseen)) if fixed_unseen else np.empty(0, np.uint64)
    for first, keys, offsets in rows.tools.blocks():
        held_out = np.isin(keys, of_unseen)
        if settings.num_unseen_tools_rows:
            held_out |= _uniform(keys, settings.seed, "tool") < settings.unseen_tools_share
        counts = np.diff(np.concatenate([[0], np.cumsum(held_out)])[offsets])
        numbers = np.diff(offsets)
        block = np.arange(first, first + len(numbers))
        free = fixed[block] == OUT
        choice.slice[block[free & (numbers > 0) & (counts == numbers)]] = UNSEEN_TOOLS
        # Rows whose slice is fixed were written with that in mind, but for the tools of another source.
        in_fixed = np.diff(np.concatenate([[0], np.cumsum(np.isin(keys, of_unseen))])[offsets])
        some = np.where(free, (counts > 0) & (counts < numbers), (in_fixed > 0) & (fixed[block] != UNSEEN_TOOLS))
        choice.leave_out(block[some], HELD_OUT_TOOL)


def _drop_duplicates(rows: Keyed, settings: DatasetSettings, choice: Choice, order: Keys) -> None:
    # The test side first: of two rows that are alike, the one that tests stays.
    ranked = np.lexsort((order, -choice.slice))
    members, starts = _grouped(rows.exact.read(), ranked[choice.slice[ranked] != OUT])
    leaders = np.repeat(members[starts[:-1]], np.diff(starts))
    others = members != leaders
    choice.like[members[others]] = leaders[others]
    choice.leave_out(members[others], EXACT)
    threshold = settings.near_duplicates
    if threshold is None:
        return
    offered = rows.offered.read()
    for band in rows.bands:
        members, starts = _grouped(band.read() ^ offered, ranked[choice.slice[ranked] != OUT])
        for number in np.flatnonzero(np.diff(starts) > 1).tolist():
            kept: list[tuple[int, Keys]] = []
            for row in members[starts[number] : starts[number + 1]].tolist():
                shingles = rows.shingles[row]
                like = next((other for other, theirs in kept if similarity(theirs, shingles) >= threshold), None)
                if like is not None:
                    choice.like[row] = like
                    choice.leave_out([row], NEAR)
                elif len(kept) < MAX_COMPARED:
                    kept.append((row, shingles))


def _grouped(keys: Array, members: Array) -> tuple[Array, Array]:
    """The members with those of equal keys side by side, else in their order; and where each group starts, then their number."""
    keys = keys[members]
    by_key = np.argsort(keys, kind="stable")
    keys = keys[by_key]
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]]))
    return members[by_key], np.concatenate([starts, [len(keys)]])


def _decontaminate(rows: Keyed, settings: DatasetSettings, choice: Choice, benchmarks: Benchmarks) -> None:
    tested = np.flatnonzero(choice.slice > TRAIN).tolist()
    asked = {int(key): row for row in tested for key in rows.asked[row]}
    said = {int(key): row for row in tested for key in rows.word_runs[row]}
    for ragged, owners, wanted, reason in (
        (rows.requests, asked, np.fromiter(asked, np.uint64), ASKED_IN_TEST),
        (rows.word_runs, said, np.fromiter(said, np.uint64), SHARES_TEST),
        (rows.requests, {}, benchmarks.requests, SHARES_BENCHMARK),
        (rows.word_runs, {}, benchmarks.runs, SHARES_BENCHMARK),
    ):
        if not len(wanted) or (ragged is rows.word_runs and settings.decontaminate_words is None):
            continue
        for first, values, offsets in ragged.blocks():
            block = np.arange(first, first + len(offsets) - 1)
            found = block[any_in(values, offsets, wanted) & (choice.slice[block] == TRAIN)].tolist()
            choice.leave_out(found, reason)
            for row in found if owners else ():
                choice.like[row] = next(owners[key] for key in ragged[row].tolist() if key in owners)


def _limit_training(rows: Keyed, settings: DatasetSettings, choice: Choice, order: Keys) -> None:
    training = _in_order(np.flatnonzero(choice.slice == TRAIN), order)
    limit = len(training)
    if settings.max_rows is not None:
        limit = min(limit, max(0, settings.max_rows - int((choice.slice > TRAIN).sum())))
    weights = [source.weight for source in settings.sources]
    given = [weight for weight in weights if weight is not None]
    if not given:
        choice.leave_out(training[limit:], BEYOND_MAX)
        return
    shares = np.array(given) / sum(given)
    source_of = rows.source.read()
    of_source = [training[source_of[training] == index] for index in range(len(shares))]
    for index, (source, members) in enumerate(zip(settings.sources, of_source, strict=True)):
        if not len(members):
            left_out = choice.counts_in(source_of == index)
            raise ValueError(
                f"dataset.sources: {source.title!r} has a weight and no row to train on; leave it out or mend it (its usable "
                f"rows, left out: {', '.join(f'{n} {reason}' for reason, n in left_out.items()) or 'none'})"
            )
    # The most rows that keep the shares: what one source lacks, the others must not make up.
    total = min(limit, *(int(len(members) / share) for members, share in zip(of_source, shares, strict=True)))
    counts = np.floor(total * shares).astype(int)
    # What rounding leaves over goes to the largest rests.
    counts[np.argsort(-(total * shares - counts), kind="stable")[: total - counts.sum()]] += 1
    for members, count in zip(of_source, counts, strict=True):
        choice.leave_out(members[count:], BEYOND_WEIGHT)


def _in_order(members: Array, order: Keys, fixed: Array | None = None) -> Array:
    """Rows by their hash; those that a source put into a test slice before all others, where ``fixed`` is given."""
    first = np.zeros(len(members)) if fixed is None else -fixed[members]
    ordered: Array = members[np.lexsort((members, order[members], first))]
    return ordered


def _hashed(keys: Array, seed: int, purpose: str) -> Keys:
    """64-bit hashes of keys that differ by seed and purpose."""
    salt = int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}".encode()).digest()[:8], "big")
    return mixed(keys ^ np.uint64(salt))


def _uniform(keys: Array, seed: int, purpose: str) -> npt.NDArray[np.float64]:
    """The hashes as numbers of [0, 1)."""
    return _hashed(keys, seed, purpose).astype(np.float64) / 2.0**64
