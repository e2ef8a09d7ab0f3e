"""What scoring costs: ``python -m tests.benchmarks.scoring``. Examples per second on one core; at least 20,000 is the aim."""

import random
import time

from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.prediction import Prediction, Reading
from tasks.evaluation.scoring import score

NUM_EXAMPLES = 40_000
SHARE_PARALLEL, SHARE_NO_TOOL, SHARE_WRONG = 0.15, 0.2, 0.3


def main() -> None:
    rng = random.Random(1)
    tools = tuple(
        {
            "name": f"tool_{i}",
            "description": "does something",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"},
                    "count": {"type": "integer"},
                    "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                },
                "required": ["place", "count"],
            },
        }
        for i in range(4)
    )

    def call(wrong: bool) -> Call:
        return Call(rng.choice(tools)["name"], {"place": "Oslo" if not wrong else "Bergen", "count": rng.randint(0, 3)})

    pairs = []
    for i in range(NUM_EXAMPLES):
        kind = rng.random()
        num_calls = 0 if kind < SHARE_NO_TOOL else 3 if kind < SHARE_NO_TOOL + SHARE_PARALLEL else 1
        expected = tuple(call(False) for _ in range(num_calls))
        given = expected[::-1] if rng.random() > SHARE_WRONG else tuple(call(True) for _ in range(num_calls))
        example = Example(str(i), (Message("user", "q"),), tools, expected, "", "s", "test")
        pairs.append((example, Prediction(str(i), "t", Reading(given), Reading(given), 1, 1, False, 1.0)))
    began = time.process_time()
    scores = [score(example, prediction) for example, prediction in pairs]
    seconds = time.process_time() - began
    right = sum(s.outcome.value == "correct" for s in scores)
    print(
        f"{NUM_EXAMPLES} examples, {right} right: {NUM_EXAMPLES / seconds:,.0f} examples/s on one core ({seconds:.2f} s)"
    )


if __name__ == "__main__":
    main()
