"""Other engines beside our own answers: ``python -m tests.benchmarks.engines STORAGE RUN [--vllm PYTHON] [--chat URL]``.

Asks the test requests of a finished run of the model ``embedded`` again: through vLLM's server as a job starts it, in the run's
precision, which gets our token ids and must therefore answer as we did but for rounding; and through a server that renders and
parses by itself, as ``transformers serve``, whose answers are its own (its seconds hold the loading of the model). Table last:
answers equal to ours to the letter, the same calls.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks.contracts.files import read_json
from tasks.contracts.prediction import Prediction, prediction_from_record
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import EndpointSettings, ModelSettings, StorageSettings, VllmSettings
from tasks.dataset.rendering.family import FAMILIES, detect_family, encode_prompt
from tasks.dataset.stored import read_examples
from tasks.inference.endpoint import Endpoint
from tasks.inference.vllm_server import serving
from tasks.models.load import load_model, load_tokenizer
from tasks.models.materialise import materialise


def same(theirs: Sequence[Prediction], ours: Sequence[Prediction]) -> tuple[int, int]:
    """How many answers have the same text, and how many the same calls."""
    by_id = {prediction.example_id: prediction for prediction in ours}
    pairs = [(prediction, by_id[prediction.example_id]) for prediction in theirs]
    return (
        sum(a.text.strip() == b.text.strip() for a, b in pairs),
        sum(a.lenient.calls == b.lenient.calls for a, b in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("storage", type=Path)
    parser.add_argument("run")
    parser.add_argument("--vllm", help="interpreter of an environment that has vLLM")
    parser.add_argument("--chat", help="a server's address up to /v1, which loads models by their folders' names")
    parser.add_argument("--requests", type=int, help="only so many")
    arguments = parser.parse_args()
    storage = arguments.storage.resolve()
    folder = RunFolder(StorageSettings(shared=str(storage)), arguments.run)
    settings = read_json(folder.experiment)["experiment"]["inference"]
    if settings["temperature"]:
        raise SystemExit(
            f"{arguments.run} drew its answers (inference.temperature={settings['temperature']}); take a greedy run"
        )
    base = materialise(ModelSettings(name="embedded"), storage)
    tokenizer, family = load_tokenizer(base), FAMILIES[detect_family(base)]
    examples = read_examples(folder.dataset / "test.parquet")[: arguments.requests]
    longest = max(len(encode_prompt(tokenizer, family, example)) for example in examples) + settings["max_new_tokens"]
    rows = []
    for which, adapter in (("baseline", None), ("finetuned", folder.adapter)):
        precision = read_json(folder.inference(which) / "manifest.json")["precision"]
        stored = pq.read_table(folder.inference(which) / "predictions.parquet").to_pylist()
        ours = [prediction_from_record(record) for record in stored]

        def ask(
            who: str, endpoint: EndpointSettings, name: str, key: str | None, *, which: Any = which, ours: Any = ours
        ) -> None:
            theirs, began = list[Prediction](), time.perf_counter()
            Endpoint(endpoint, name, tokenizer, family, settings["max_new_tokens"], key=key).ask(
                examples, theirs.append
            )
            texts, calls = same(theirs, ours)
            rows.append((who, which, len(theirs), texts, calls, time.perf_counter() - began))
            print(rows[-1], flush=True)

        if arguments.vllm:
            with (
                tempfile.TemporaryDirectory() as logs,
                serving(
                    VllmSettings(python=arguments.vllm),
                    base,
                    adapter,
                    precision=precision,
                    max_tokens=longest,
                    device=None,
                    log=Path(logs) / "vllm.log",
                ) as served,
            ):
                ask("vLLM", served.endpoint, served.name, served.key)
        if arguments.chat:
            chat = EndpointSettings(
                url=arguments.chat, original="-", finetuned="-", api="chat", max_concurrency=4, timeout_s=600
            )
            with tempfile.TemporaryDirectory() as whole:
                if adapter is not None:
                    # transformers serve loads no adapters: one model of both.
                    from peft import PeftModel

                    merged = PeftModel.from_pretrained(load_model(base, "float32"), adapter).merge_and_unload()
                    merged.save_pretrained(whole)
                    tokenizer.save_pretrained(whole)
                ask("chat", chat, str(base) if adapter is None else whole, None)
    print(f"\n{'':6} {'':10} answers  same text  same calls  seconds")
    for who, which, count, texts, calls, seconds in rows:
        print(f"{who:6} {which:10} {count:7} {texts:10} {calls:11} {seconds:8.0f}")


if __name__ == "__main__":
    main()
