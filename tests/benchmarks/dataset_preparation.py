"""Raw rows to packed tokens: this project's preparation against the straightforward path, in one run.

    python -m tests.benchmarks.dataset_preparation [ROWS] [--ours-only [--everything]]

Straightforward: ``datasets.map`` with ``apply_chat_template`` in one process, then TRL's own packing, from the rows that ours
kept. Both write the conversations of Qwen2.5 with the tokenizer of SmolLM2 and mark the answers; the marks differ in line
breaks and are not compared, the token ids must be identical, row by row, or no ratio is printed. Rows are real ones
(../shared/data, where they are) and embedded ones, made unlike each other in every turn; duplicates and overlap with the
test are not looked for, but with --everything. Theirs writes packs of tokens, ours tokens and which rows share a pack.
Figures: seconds, rows/s and their ratio; processor seconds, which other work on the machine moves less; the highest memory
of the process and its workers together; and how full the packs are.
"""

# Nothing heavy is imported here, since workers import this module as well, as they do the job's.
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

ROWS = 112_960
TOKENS = 4096
SEED = 7
WORDS = [
    f"{a}{b}"
    for a in ("ka", "lo", "mi", "ne", "ru", "so", "ti", "va")
    for b in ("ber", "din", "gor", "lan", "mus", "nik")
]


def write_rows(path: Path, count: int) -> None:
    """ShareGPT rows with tools; everything that is said in words differs from row to row, tools and calls recur."""
    from tasks.dataset.embedded.generate import generate
    from tests.conftest import SHARED_DATA

    real = SHARED_DATA / "glaive_toolcall_en_demo.json"
    originals = json.loads(real.read_text()) if real.exists() else []
    roles = {"human": "human", "gpt": "gpt"}
    for row in generate(split="train", num_rows=max(100, 400 - len(originals)), seed=1):
        turns = [t for t in row["conversations"] if t["from"] in roles]
        for turn in turns:
            if turn["from"] == "gpt" and turn["value"].count("<tool_call>") == 1:
                body = turn["value"].removeprefix("<tool_call>").removesuffix("</tool_call>").strip()
                turn |= {"from": "function_call", "value": body}
        if not any("<tool_call>" in turn["value"] for turn in turns):
            originals.append({"conversations": turns, "tools": row["tools"]})
    draw = random.Random(1)
    with path.open("w") as file:
        for number in range(count):
            row = originals[number % len(originals)]
            turns = [
                {**turn, "value": f"{draw.choice(WORDS)} {number}, {turn['value']}"} if turn["from"] in roles else turn
                for turn in row["conversations"]
            ]
            file.write(json.dumps({"tools": row["tools"], "conversations": turns}) + "\n")


class PeakMemory:
    """The highest proportional set size of this process and its children, in bytes, every half second."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)


def cpu_s() -> float:
    """Processor seconds of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])


def straightforward(rows: Path, kept: set[str], tokenizer, work: Path):
    """The seconds it took, those of processors, the tokens and masks by the row's number, and the packs."""
    from datasets import Dataset, load_dataset
    from trl import data_utils

    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}

    def tokenise(row):
        messages = []
        for turn in row["conversations"]:
            message = {"role": roles[turn["from"]], "content": turn["value"]}
            if turn["from"] == "function_call":
                message |= {"content": "", "tool_calls": [{"type": "function", "function": json.loads(turn["value"])}]}
            messages.append(message)
        tools = [
            t if "function" in t else {"type": "function", "function": t} for t in json.loads(row["tools"] or "[]")
        ]
        done = tokenizer.apply_chat_template(
            messages, tools=tools or None, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": done["input_ids"], "assistant_masks": done["assistant_masks"]}

    surviving = work / "surviving.jsonl"
    with rows.open() as source, surviving.open("w") as target:
        target.writelines(line for number, line in enumerate(source) if f"rows-{number:06d}" in kept)
    began, cpu_began = time.perf_counter(), cpu_s()
    loaded = load_dataset("json", data_files=str(surviving), split="train", cache_dir=str(work / "cache"))
    assert isinstance(loaded, Dataset)
    tokenised = loaded.map(tokenise, remove_columns=loaded.column_names, num_proc=None)
    packs = data_utils.pack_dataset(tokenised, TOKENS, strategy="bfd")
    return time.perf_counter() - began, cpu_s() - cpu_began, tokenised, packs


def main() -> None:
    count = next((int(a) for a in sys.argv[1:] if a.isdigit()), ROWS)
    from tasks.contracts.settings import DatasetSettings, ModelSettings
    from tasks.dataset.prepare import prepare
    from tasks.dataset.rendering.family import FAMILIES
    from tasks.models.load import load_tokenizer
    from tasks.models.materialise import materialise

    work = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        rows, output = work / "rows.jsonl", work / "prepared"
        write_rows(rows, count)
        tokenizer = load_tokenizer(materialise(ModelSettings(name="embedded"), Path("storage")))
        settings = DatasetSettings(
            seed=SEED,
            sources=[{"name": str(rows), "format": "sharegpt"}],
            test_share=0.001,
            num_test_rows=1,
            max_length_tokens=TOKENS,
            packing_length_tokens=TOKENS,
            **({} if "--everything" in sys.argv else {"near_duplicates": None, "decontaminate_words": None}),
        )
        output.mkdir()
        tokenizer.backend_tokenizer.save(str(work / "tokenizer.json"))
        with PeakMemory() as memory:
            began, cpu_began = time.perf_counter(), cpu_s()
            prepare(settings, FAMILIES["qwen2_5"], work / "tokenizer.json", output, print)
            ours_s, ours_cpu_s = time.perf_counter() - began, cpu_s() - cpu_began
        quality = json.loads((output / "quality.json").read_text())
        print(json.dumps(quality["rows"]))
        taught = quality["rows"]["train"]
        print(f"ours: {ours_s:.1f} s ({ours_cpu_s:.1f} of processors), {taught / ours_s:.0f} rows/s, "
              f"{memory.bytes / 1e9:.2f} GB at most, {rows.stat().st_size / 1e6:.0f} MB of rows, {quality['packing']}"
              )  # fmt: skip
        if "--ours-only" in sys.argv:
            return
        compare(rows, output, tokenizer, work, taught, ours_s)
    finally:
        shutil.rmtree(work)


def compare(rows: Path, output: Path, tokenizer, work: Path, taught: int, ours_s: float) -> None:
    """The other path, that both made the same, and the ratio."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import trl

    from tasks.dataset.split import shuffle_keys

    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5_training.jinja"
    tokenizer.chat_template = template.read_text()
    ids = pq.read_table(output / "train.parquet", columns=["id"])["id"].to_pylist()
    theirs_s, theirs_cpu_s, tokenised, packs = straightforward(rows, set(ids), tokenizer, work)
    with pa.memory_map(str(output / "train.arrow")) as file:
        ours = pa.ipc.open_stream(file).read_all()["input_ids"].to_pylist()
    # The template writes a line break after the last end of turn as well, which nobody is asked or taught.
    end = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
    theirs = tokenised["input_ids"]
    order = np.argsort(shuffle_keys(ids, SEED), kind="stable").tolist()
    different = [row for position, row in enumerate(order) if ours[position] != theirs[row][:-end]]
    if different or len(theirs) != len(ours):
        example = f"; the first as theirs: {tokenizer.decode(theirs[different[0]])!r}" if different else ""
        raise SystemExit(f"{len(different)} of {len(theirs)} rows are not identical to ours ({len(ours)}){example}")
    speed = f"{taught / theirs_s:.0f} rows/s"
    print(f"straightforward: {theirs_s:.1f} s ({theirs_cpu_s:.1f} of processors), {speed}, {len(packs)} packs")
    print(f"identical token ids in {len(ours)} rows; ours has {theirs_s / ours_s:.2f} x the rows/s")


if __name__ == "__main__":
    main()
