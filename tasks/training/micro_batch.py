"""Out of memory: the next attempt takes a smaller micro-batch and the same global batch, once."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tasks.contracts.attempt import TryAgain
from tasks.contracts.files import read_json, write_json

FILE = "micro_batch.json"


class OutOfMemory(RuntimeError):
    """The rank's memory does not hold the micro-batch."""


@dataclass(frozen=True)
class Reduction:
    """What an attempt that ran out of memory leaves for the next: conversations per GPU at a time, tried and to use.

    Attributes:
        recompute: of one layer in so many activations are recomputed from now on; 0: of none.
    """

    tried: int
    use: int
    why: str
    recompute: int = 0


def read_reduction(output: Path, wanted: int | Literal["auto"]) -> Reduction | None:
    """The reduction of an earlier attempt, if it was made from the size that the settings ask for."""
    path = output / FILE
    if not path.exists():
        return None
    reduction = Reduction(**read_json(path))
    return reduction if wanted in ("auto", reduction.tried) else None


def reduce(
    output: Path,
    *,
    tried: int,
    why: str,
    already: Reduction | None,
    may_recompute: bool = False,
    recompute: int = 0,
) -> OutOfMemory | TryAgain:
    """Note the smaller size for the next attempt, and return the error that this one ends with.

    Args:
        may_recompute: not all activations are recomputed yet, and they may be: what is left where one conversation is too much.
        recompute: of one layer in so many they were, and must be again; 0: of none.
    """
    advice = (
        "set training.gradient_checkpointing=true, lower dataset.max_length_tokens or training.per_device_batch_size, or "
        "take a GPU with more memory"
    )
    if already is not None:
        return OutOfMemory(f"{why}, after the size had been lowered from {already.tried}: {advice}")
    if tried == 1 and may_recompute:
        write_json(output / FILE, asdict(Reduction(1, 1, why, recompute=1)))
        return TryAgain(f"{why}. Started again, the run recomputes all activations (gradient_checkpointing=auto)")
    if tried == 1:
        return OutOfMemory(f"{why}: {advice}")
    # The largest size below that splits the same global batch among the same ranks.
    use = max(size for size in range(1, tried) if tried % size == 0)
    write_json(output / FILE, asdict(Reduction(tried, use, why, recompute=recompute)))
    return TryAgain(
        f"{why}. Started again, the run takes {use} at a time and accumulates {tried // use} times as often; the global "
        "batch stays"
    )
