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
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.contracts.settings import DatasetSettings
from tasks.dataset.benchmarks import Benchmarks
from tasks.dataset.features import Keys, mixed, similarity
from tasks.dataset.ragged import Array, Ragged, any_in

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


@dataclass(frozen=True)
class Keyed:
    """The keys of all usable rows, in the order in which they were read.

    Attributes:
        source: index of the row's source, [rows].
        fixed: the slice that the source itself gives, or OUT, [rows].
        opening: key of the first request, [rows].
        exact: key of all requests, the tools' names and the calls, [rows].
        bands: MinHash, [rows, bands].
        tools: keys of the tools on offer.
        requests: keys of everything the user says; ``asked``: of what a test would ask.
        shingles, word_runs: keys of runs of words.
    """

    source: Array
    fixed: Array
    opening: Array
    exact: Array
    bands: Array
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
        reason: why a row is OUT.
        like: the row that a duplicate is like, or the test row that a training row has words in common with.
    """

    slice: npt.NDArray[np.int8]
    reason: dict[int, str]
    like: dict[int, int]

    def leave_out(self, rows: Sequence[int] | Array, reason: str) -> None:
        """Take rows out of their slice."""
        self.slice[rows] = OUT
        self.reason |= dict.fromkeys(np.asarray(rows).tolist(), reason)

    @property
    def counts(self) -> dict[str, int]:
        """Rows left out by reason."""
        return dict(sorted(Counter(self.reason.values()).items()))


def choose(rows: Keyed, settings: DatasetSettings, benchmarks: Benchmarks) -> Choice:
    """The slice of every row.

    Raises:
        ValueError: a source with a weight has no rows.
    """
    seed = settings.seed
    order = _hashed(rows.opening, seed, "order")
    slice_ = np.where(_uniform(rows.opening, seed, "side") < settings.test_share, TEST, TRAIN).astype(np.int8)
    slice_ = np.where(rows.fixed == OUT, slice_, rows.fixed)
    choice = Choice(slice_, {}, {})
    _hold_out_tools(rows, settings, choice)
    for index, source in enumerate(settings.sources):
        if source.max_rows is not None:
            of_source = _in_order(np.flatnonzero((choice.slice != OUT) & (rows.source == index)), order, rows.fixed)
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


def shuffled(ids: Sequence[str], seed: int) -> list[int]:
    """Positions of the ids in a seeded order, so that categories and tools mix."""
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}\0{ids[i]}".encode()).digest())


def permutation(count: int, seed: int) -> list[int]:
    """A seeded derangement: no position keeps its own."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    target = [0] * count
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        target[here] = there
    return target


def _hold_out_tools(rows: Keyed, settings: DatasetSettings, choice: Choice) -> None:
    fixed_unseen = [rows.tools[row] for row in np.flatnonzero(rows.fixed == UNSEEN_TOOLS).tolist()]
    of_unseen = np.unique(np.concatenate(fixed_unseen)) if fixed_unseen else np.empty(0, np.uint64)
    for first, keys, offsets in rows.tools.blocks():
        held_out = np.isin(keys, of_unseen)
        if settings.num_unseen_tools_rows:
            held_out |= _uniform(keys, settings.seed, "tool") < settings.unseen_tools_share
        counts = np.diff(np.concatenate([[0], np.cumsum(held_out)])[offsets])
        numbers = np.diff(offsets)
        block = np.arange(first, first + len(numbers))
        free = rows.fixed[block] == OUT
        choice.slice[block[free & (numbers > 0) & (counts == numbers)]] = UNSEEN_TOOLS
        # Rows whose slice is fixed were written with that in mind, but for the tools of another source.
        in_fixed = np.diff(np.concatenate([[0], np.cumsum(np.isin(keys, of_unseen))])[offsets])
        some = np.where(free, (counts > 0) & (counts < numbers), (in_fixed > 0) & (rows.fixed[block] != UNSEEN_TOOLS))
        choice.leave_out(block[some], HELD_OUT_TOOL)


def _drop_duplicates(rows: Keyed, settings: DatasetSettings, choice: Choice, order: Keys) -> None:
    # The test side first: of two rows that are alike, the one that tests stays.
    rank = np.empty(len(order), np.int64)
    rank[np.lexsort((np.arange(len(order)), order, -choice.slice))] = np.arange(len(order))
    usable = choice.slice != OUT
    for leader, other in _pairs(rows.exact, usable, rank):
        choice.like[other] = leader
        choice.leave_out([other], EXACT)
    if settings.near_duplicates is None:
        return
    same_tools = np.array([_together(rows.tools[row]) for row in range(len(rank))], np.uint64)
    for band in range(rows.bands.shape[1]):
        for members in _groups(rows.bands[:, band], same_tools, choice.slice != OUT, rank):
            kept: list[int] = []
            for row in members:
                like = next((other for other in kept if _near(rows, other, row, settings.near_duplicates)), None)
                if like is not None:
                    choice.like[row] = like
                    choice.leave_out([row], NEAR)
                elif len(kept) < MAX_COMPARED:
                    kept.append(row)


def _together(keys: Keys) -> int:
    """One key of several."""
    return int.from_bytes(hashlib.blake2b(keys.tobytes(), digest_size=8).digest(), "big")


def _near(rows: Keyed, one: int, other: int, threshold: float) -> bool:
    return similarity(rows.shingles[one], rows.shingles[other]) >= threshold


def _groups(keys: Array, tools: Array, usable: npt.NDArray[np.bool_], rank: Array) -> Iterator[list[int]]:
    """Usable rows that share key and tools, two or more, the lowest rank first."""
    members = np.flatnonzero(usable)
    members = members[np.lexsort((rank[members], tools[members], keys[members]))]
    if not len(members):
        return
    borders = np.flatnonzero((np.diff(keys[members]) != 0) | (np.diff(tools[members]) != 0)) + 1
    for group in np.split(members, borders):
        if len(group) > 1:
            yield group.tolist()


def _pairs(keys: Array, usable: npt.NDArray[np.bool_], rank: Array) -> list[tuple[int, int]]:
    """``(first, other)`` for every usable row that shares its key with one of lower rank."""
    members = np.flatnonzero(usable)
    members = members[np.lexsort((rank[members], keys[members]))]
    if not len(members):
        return []
    starts_group = np.concatenate([[True], np.diff(keys[members]) != 0])
    leaders = members[np.flatnonzero(starts_group)[np.cumsum(starts_group) - 1]]
    return list(zip(leaders[~starts_group].tolist(), members[~starts_group].tolist(), strict=True))


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
    of_source = [training[rows.source[training] == index] for index in range(len(shares))]
    for source, members in zip(settings.sources, of_source, strict=True):
        if not len(members):
            raise ValueError(
                f"dataset.sources: {source.title!r} has a weight and no row to train on; leave it out or mend it"
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
