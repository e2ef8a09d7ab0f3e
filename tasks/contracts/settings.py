"""Every setting of a fine-tuning run: one frozen, typed tree, validated where it is defined.

The Prefect UI makes its form of this module: each field's title, default, unit and description stand here and nowhere
else. Model and dataset have no default, because no default is right for anyone's own case.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tasks.contracts.frozen_settings import Settings
from tasks.contracts.pool_settings import PoolSettings


def _plain_path(value: str) -> str:
    if "\0" in value or "\n" in value:
        raise ValueError(f"{value!r} is not a path: it contains a line break or a NUL character")
    return value


FolderPath = Annotated[str, AfterValidator(_plain_path)]


Precision = Literal["auto", "float32", "mixed", "bfloat16"]


class ModelSettings(Settings):
    """Which model is fine-tuned."""

    name: str = Field(min_length=1, examples=["embedded", "meta-llama/Llama-3.1-8B-Instruct", "/models/my-model"])
    """`embedded` (SmolLM2-135M-Instruct, needs no network), a local folder, or a model id on the Hugging Face hub."""
    revision: str | None = None
    """Commit of a model on the hub; only a full commit hash lets later runs reuse this run's results."""
    family: Literal["auto", "smollm2", "llama3", "qwen2", "qwen2_5", "qwen3", "mistral", "generic"] = "auto"
    """How conversations are written for the model; `auto` reads it off the model and fails when it is not known.
    `generic` is plain text for models without a format for tools; it is never chosen by itself."""


Format = Literal["auto", "hermes", "glaive", "sharegpt", "xlam", "toolace", "openai"]


class SourceSettings(Settings):
    """Where rows come from."""

    name: FolderPath = Field(
        min_length=1,
        examples=["embedded", "NousResearch/hermes-function-calling-v1", "/data/rows.jsonl", "s3://bucket/rows"],
    )
    """`embedded` (written from a seed, needs no network), a .jsonl, .json, .parquet or .csv file, a folder of such files,
    a URL that fsspec knows (`s3://`, `gs://`), or a dataset id on the Hugging Face hub."""
    format: Format = "auto"
    """Format of the rows: hermes-function-calling-v1, glaive-function-calling-v2, ShareGPT with tools,
    xlam-function-calling-60k, ToolACE, or OpenAI `messages` with `tools`. `auto` reads it off the first rows."""
    config: str | None = None
    """Configuration (subset) of a dataset on the hub, as `func_calling_singleturn`."""
    revision: str | None = None
    """Commit of a dataset on the hub; only a full commit hash lets later runs reuse the prepared dataset."""
    max_rows: int | None = Field(default=None, ge=1)
    """Usable rows to take of this source, chosen by the seed; empty: all."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the training rows, relative to the other sources' weights. All sources have one or none has."""

    @property
    def title(self) -> str:
        """Name and configuration, for people."""
        return f"{self.name}/{self.config}" if self.config else self.name

    @model_validator(mode="after")
    def _embedded_is_hermes(self) -> Self:
        if re.match(r"\w+://[^/]*@", self.name):
            raise ValueError("a URL with a name or password in it: credentials belong in the environment")
        if (self.config or self.revision) and "://" in self.name:
            raise ValueError(f"config and revision are of datasets on the hub, not of {self.name!r}")
        if self.name == "embedded" and self.format not in ("auto", "hermes"):
            raise ValueError(f"the embedded dataset is in format hermes, not {self.format}")
        return self


def _sources(value: object) -> object:
    """One name or one source may stand for a list of one."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]


class AugmentationSettings(Settings):
    """Changed copies of training rows; everything is off unless asked for. Test rows are never changed."""

    mask_names: float = Field(default=0.0, ge=0, le=1)
    """Share of training rows in which functions and parameters get names without meaning, so that only their
    descriptions tell what they do (as Hammer was trained)."""
    shuffle_tools: bool = False
    """Offer each row's tools in a seeded order of its own."""
    num_distractor_tools: int = Field(default=0, ge=0, le=64)
    """Tools of other rows that are offered besides a row's own."""
    irrelevance: float = Field(default=0.0, ge=0, le=1)
    """Share of training rows that stand a second time without the tools that fit, and with an answer that says so."""
    irrelevance_answer: str = Field(default="None of the functions offered can do that.", min_length=1)
    """What such a row teaches to answer."""


class DatasetSettings(Settings):
    """Which conversations teach and test it."""

    sources: Annotated[tuple[SourceSettings, ...], BeforeValidator(_sources)] = Field(
        min_length=1, examples=[[{"name": "embedded"}], [{"name": "rows.jsonl", "format": "openai"}]]
    )
    """Where the rows come from; several are mixed."""
    max_rows: int | None = Field(default=None, ge=2)
    """Rows to use in all, chosen by the seed; empty: all. The embedded dataset writes this many."""
    num_test_rows: int = Field(default=100, ge=1)
    """Rows held out to compare the two models, as many as the test side has."""
    num_unseen_tools_rows: int = Field(default=0, ge=0)
    """Further test rows, whose tools training never sees."""
    test_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of conversations on the test side. A conversation's side depends on its first request and the seed alone: it
    stays where it is when other rows are added, and rows of the test side never teach."""
    unseen_tools_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of tools held out for `num_unseen_tools_rows`, by their names and the seed alone. Rows that offer such tools beside
    others are used nowhere: many of them, where few tools stand in most rows."""
    test_turns: Literal["first_call", "every_call"] = "first_call"
    """What of a test conversation is asked: its first answer that makes a call, or each of them (then requests of one
    conversation are not independent of each other)."""
    max_length_tokens: int = Field(default=4096, ge=16)
    """Longest conversation; longer ones are rejected and counted, never cut."""
    near_duplicates: float | None = Field(default=0.9, gt=0, le=1)
    """Rows whose runs of three words overlap by this much (Jaccard) are duplicates; empty: only exact ones are."""
    decontaminate_words: int | None = Field(default=8, ge=3)
    """A training row whose user says as many words in a row as a test request or a benchmark does is left out; empty: only
    rows with a whole test request are."""
    benchmarks: tuple[FolderPath, ...] = ()
    """Files or folders (.json, .jsonl) of benchmarks that the training must not contain; `bfcl`: the questions of the
    installed package bfcl-eval."""
    augmentation: AugmentationSettings = AugmentationSettings()
    packing_length_tokens: int | None = Field(default=None, ge=16)
    """Also lay out the training rows in packs of this many tokens, whole conversations only; empty: no packs."""
    num_workers: int | None = Field(default=None, ge=1, le=256)
    """Processes that read and tokenise; empty: one per processor, at most 32."""
    seed: int = 7
    """Chooses the rows, the split, and what the embedded dataset writes."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        held_out = self.num_test_rows + self.num_unseen_tools_rows
        if self.max_rows is not None and self.max_rows <= held_out:
            raise ValueError(
                f"max_rows={self.max_rows} leaves nothing to train on: {held_out} rows are held out "
                f"(num_test_rows + num_unseen_tools_rows); use more than {held_out}"
            )
        if self.max_rows is None and any(s.name == "embedded" for s in self.sources):
            raise ValueError("the embedded dataset is written on demand and needs max_rows, e.g. max_rows=420")
        for source in self.sources:
            if source.name == "embedded" and source.max_rows is not None and source.max_rows <= held_out:
                raise ValueError(
                    f"sources: embedded with max_rows={source.max_rows} leaves nothing to train on: {held_out} "
                    f"rows are held out (num_test_rows + num_unseen_tools_rows); use more than {held_out}"
                )
        titles = [source.title for source in self.sources]
        if twice := {title for title in titles if titles.count(title) > 1}:
            raise ValueError(f"sources: {sorted(twice)} stand twice; name each source once")
        if self.benchmarks and self.decontaminate_words is None:
            raise ValueError(
                "benchmarks are compared by runs of words; set decontaminate_words, e.g. decontaminate_words=8"
            )
        weighted = [source for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            without = next(source.name for source in self.sources if source.weight is None)
            raise ValueError(f"sources: {without!r} has no weight and others have; give all of them one, or none")
        if self.packing_length_tokens is not None and self.packing_length_tokens < self.max_length_tokens:
            raise ValueError(
                f"packing_length_tokens={self.packing_length_tokens} is less than max_length_tokens="
                f"{self.max_length_tokens}: a longest conversation would fit no pack, and none is ever cut"
            )
        return self

    @property
    def title(self) -> str:
        """The sources' names, for people."""
        return " + ".join(source.title for source in self.sources)


class LoraSettings(Settings):
    """The adapter."""

    rank: int = Field(default=16, ge=1)
    """Rank of the two low-rank factors."""
    alpha: int = Field(default=32, ge=1)
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs dropped in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, or the names of the linear layers that get an adapter."""
    first_layer: int = Field(default=0, ge=0)
    """Lowest transformer layer that gets an adapter; those below are left as they are and need no backward pass."""


class TrainingSettings(Settings):
    """How the adapter is trained."""

    strategy: Literal["ddp", "fsdp", "zero3"] = "ddp"
    """`ddp`: every GPU holds the whole model; the fastest for what fits. `fsdp`: the frozen base is sharded over all GPUs
    (FSDP2), the adapter is whole on each. `zero3`: base, adapter and AdamW's moments are all sharded (DeepSpeed, the extra
    `zero3`). All train the same adapter, and a run may go on with another."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the training rows."""
    max_steps_per_epoch: int | None = Field(default=None, ge=1)
    """Ends an epoch after this many optimiser steps; empty: the whole data."""
    global_batch_size: int = Field(default=8, ge=1)
    """Conversations per optimiser step over all GPUs, packed or not."""
    per_device_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    """Conversations per GPU at a time; the rest of the global batch is accumulated. `auto`: as many as its memory holds, until
    16,384 tokens are reached; one on processors."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    """Highest learning rate of AdamW."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser steps over which the learning rate rises from 0."""
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the learning rate goes on after warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay."""
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    """Decay of AdamW's second moment; shorter runs want it lower."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool | Annotated[int, Field(ge=2)] | Literal["auto"] = False
    """Recompute activations in the backward pass: less memory, about a third more time. A number: those of every so manieth
    layer only, for so much less of both. `auto`: where memory does not suffice otherwise, and of no more layers than it takes;
    never on processors."""
    precision: Precision = "auto"
    """Number format of the frozen weights and of the products; adapters always keep float32 weights. `mixed`: bfloat16
    products and matrices, float32 embedding, norms and residual stream. `auto`: bfloat16 on GPUs, mixed on processors that
    multiply bfloat16 natively, float32 on others."""
    attention: Literal["varlen", "flex"] = "varlen"
    """How conversations that lie end to end on a GPU see themselves alone. `varlen`: torch's variable-length kernels, cuDNN's
    where all are equally long; the fastest. `flex`: flex attention, compiled for the model; also for layers with a sliding
    window, capped scores or sinks (Gemma, gpt-oss), which `varlen` refuses. A run may go on with the other."""
    fp8_base: bool = False
    """Multiply the decoder's frozen matrices in FP8, on GPUs that can (Ada, Hopper and later): faster, and less exact (a model of
    135 million parameters learnt 5 % slower at first). Needs `strategy=ddp` and bfloat16; adapters stay float32. Only training
    does so: inference and merged models take the base as it is."""
    save_every_steps: int = Field(default=500, ge=1)
    """Optimiser steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept, besides the one with the lowest loss."""
    collective_timeout_minutes: float = Field(default=10, gt=0)
    """A rank that stands still longer than this in training ends the attempt, which names it; loading may take longer."""
    merge_adapter: bool = False
    """Also leave the base with the adapter merged in (in float32, checked), as one model in the base's precision."""
    log_every_steps: int = Field(default=10, ge=1)
    """Optimiser steps between points of the loss curve."""
    seed: int = 7
    """Order of the rows, initial adapter, dropout."""
    shuffle_answers: bool = False
    """Control experiment: train on answers swapped between requests. An honest comparison then finds no improvement."""
    lora: LoraSettings = LoraSettings()

    @model_validator(mode="after")
    def _shardable(self) -> Self:
        if self.strategy != "ddp" and self.precision == "mixed":
            raise ValueError(
                f"strategy={self.strategy} cannot shard precision=mixed; use precision=float32, bfloat16 or auto"
            )
        return self

    @model_validator(mode="after")
    def _fp8_has_what_it_needs(self) -> Self:
        if self.fp8_base and self.strategy != "ddp":
            raise ValueError(f"fp8_base=true goes with strategy=ddp only, not {self.strategy}; set one or the other")
        if self.fp8_base and self.precision not in ("auto", "bfloat16"):
            raise ValueError(f"fp8_base=true needs precision=bfloat16 or auto, not {self.precision}")
        return self


class EndpointSettings(Settings):
    """An OpenAI-compatible server that serves both models; its key is in the environment: `OPENAI_API_KEY`."""

    url: str = Field(pattern=r"^https?://[^@\\s]+$", examples=["http://127.0.0.1:8000/v1"])
    """Up to and including `/v1`; no name or password in it."""
    original: str = Field(min_length=1)
    """Name of the original model there."""
    finetuned: str = Field(min_length=1)
    """Name under which the run's adapter is served there."""
    api: Literal["completions", "chat"] = "completions"
    """`completions` sends our own token ids and reads answers with our own parser; `chat` leaves both to the server, and is
    comparable with nothing else."""
    max_concurrency: int = Field(default=32, ge=1, le=4096)
    """Requests under way at a time, of each rank."""
    requests_per_s: float | None = Field(default=None, gt=0)
    """Most requests that a rank sends in a second; empty: as many as the server takes."""
    timeout_s: float = Field(default=120, gt=0)
    """Longest wait for a sign of the server, in seconds."""
    max_retries: int = Field(default=5, ge=0)
    """Further tries of a request that met a broken connection, an overload or a garbled answer."""
    first_pause_s: float = Field(default=0.5, ge=0)
    """Wait before the first further try, in seconds; it doubles with each, unless the server says how long to wait."""


class VllmSettings(Settings):
    """vLLM in an environment of its own: each process of the job serves itself both models, and ends the server."""

    python: str = Field(pattern=r"^/[^\x00-\x1f]*$", examples=["/opt/vllm/bin/python"])
    """Interpreter of the environment that has vLLM, the same path on every node."""
    max_concurrency: int = Field(default=256, ge=1, le=4096)
    """Requests that one server works on at a time."""
    memory_share: float = Field(default=0.85, gt=0, lt=1)
    """Of a GPU's memory, for weights and cache together."""
    start_limit_minutes: float = Field(default=15, gt=0)
    """Longest wait for a server that loads, compiles and captures."""


class InferenceSettings(Settings):
    """How both models are asked."""

    engine: Literal["transformers", "openai", "vllm"] = "transformers"
    """`transformers` runs the models on the pool, `vllm` runs vLLM's server there; `openai` asks the server of `endpoint`."""
    endpoint: EndpointSettings | None = None
    """The server, for the engine `openai`."""
    vllm: VllmSettings | None = None
    """Where vLLM is installed, for the engine `vllm`."""
    batch_size: int = Field(default=32, ge=1)
    """Requests per GPU at a time."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer; one that is cut there is marked as such."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0: the likeliest token each time (greedy). Above: answers are drawn, each from random numbers of its own, so that neither
    batches nor processes change them."""
    seed: int = Field(default=7, ge=0)
    """Of the drawn answers, where the temperature is above 0."""
    num_loss_rows: int = Field(default=32, ge=0)
    """Test rows on whose expected answers both models' loss is measured as well, the first by id."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of weights and products. `auto`: bfloat16 where the device multiplies it natively, else float32."""
    suites: tuple[Literal["bfcl"], ...] = ()
    """Public benchmarks that both models are asked besides the test rows. `bfcl`: the single-turn Python categories in the
    installed package bfcl-eval. They decide no gate."""
    suite_rows_per_category: int | None = Field(default=None, ge=1)
    """Questions of each category, spread evenly over it; empty: all."""
    adapter: Literal["trained", "none"] = "trained"
    """Control experiment: `none` compares the original model with itself. An honest comparison then finds no
    improvement."""

    @model_validator(mode="after")
    def _engine_has_its_settings(self) -> Self:
        for engine, name, given, needs in (
            ("openai", "endpoint", self.endpoint, "endpoint.url, endpoint.original and endpoint.finetuned"),
            ("vllm", "vllm", self.vllm, "vllm.python, the interpreter of an environment that has vLLM"),
        ):
            if (self.engine == engine) != (given is not None):
                raise ValueError(
                    f"engine={self.engine} with {name}={'given' if given else 'empty'}: {engine} needs {needs}; "
                    "the other engines take none"
                )
        return self


class GateSettings(Settings):
    """What makes the run a PASS. A gate left empty is not checked; one whose figure is missing fails."""

    min_exact_match: float | None = Field(default=0.85, ge=0, le=1)
    """Share of requests needing a call (tools seen in training) that the fine-tuned model answers exactly."""
    min_requests: int | None = Field(default=100, ge=1)
    """Scored requests needing a call behind that share."""
    max_p_value: float | None = Field(default=0.001, gt=0, le=1)
    """Exact McNemar test of fine-tuned against original on those requests."""
    min_abstention: float | None = Field(default=0.8, ge=0, le=1)
    """Share of requests with no fitting tool that are answered without a call."""
    min_call_rate: float | None = Field(default=0.8, ge=0, le=1)
    """Share of requests needing a call that are answered with one: abstention is worth nothing without it."""
    max_final_loss: float | None = Field(default=None, gt=0)
    """Mean training loss over the last tenth of the steps."""
    min_tokens_per_s_per_gpu: float | None = Field(default=None, gt=0)
    """Median training throughput, padding not counted."""
    min_gpu_utilization: float | None = Field(default=None, gt=0, le=1)
    """Mean share of time that GPUs were busy in training."""
    min_gpu_memory_share: float | None = Field(default=None, gt=0, le=1)
    """Highest share of a GPU's memory held in training."""
    min_inference_tokens_per_s: float | None = Field(default=None, gt=0)
    """New tokens per second of the fine-tuned model, over all GPUs."""
    max_plain_loss_increase: float | None = Field(default=None, gt=0)
    """Forgetting: by what share the loss on plain conversations may grow, as 0.1 for a tenth."""
    max_out_of_memory: int | None = Field(default=0, ge=0)
    """Attempts and batches that may fail for want of memory, although others took their place."""
    max_hours: float | None = Field(default=None, gt=0)
    """From the first job's start to the last one's end."""
    max_gpu_hours: float | None = Field(default=None, gt=0)
    """GPUs times the hours they were held, failed attempts included."""


class StorageSettings(Settings):
    """Where files lie."""

    shared: FolderPath = "storage"
    """Folder that every node sees: models, data, checkpoints, results."""
    logs: FolderPath | None = None
    """Folder for the nodes' logs; empty: beside the results."""
    scratch: FolderPath | None = None
    """Node-local folder for temporary files, never a checkpoint; empty: the system's."""
    min_free_gbytes: float = Field(default=3, ge=0)
    """A run does not start with less free space (1 GB = 10^9 bytes) on the shared folder."""

    def resolved(self) -> "StorageSettings":
        """The same with absolute paths, so that every process means the same folders."""

        def absolute(path: str | None) -> str | None:
            return None if path is None else str(Path(path).expanduser().resolve())

        return self.model_copy(
            update={"shared": absolute(self.shared), "logs": absolute(self.logs), "scratch": absolute(self.scratch)}
        )


class Experiment(Settings):
    """One fine-tuning run from rows to report."""

    model: ModelSettings
    dataset: DatasetSettings
    training: TrainingSettings = TrainingSettings()
    inference: InferenceSettings = InferenceSettings()
    gates: GateSettings = GateSettings()
    pool: PoolSettings = PoolSettings()
    storage: StorageSettings = StorageSettings()
    ask_champion: bool = False
    """Also ask the adapter that is this model's `champion` in MLflow's registry, on the same test requests: the new one takes the
    title where it is better on them, whatever rows the champion itself was trained and tested on."""

    @model_validator(mode="after")
    def _champion_can_be_asked(self) -> Self:
        if self.ask_champion and self.inference.engine == "openai":
            raise ValueError(
                "ask_champion=true with inference.engine=openai: a server of yours does not have the champion; the engines "
                "transformers and vllm ask it on the pool"
            )
        if self.ask_champion and self.inference.adapter == "none":
            raise ValueError(
                "ask_champion=true with inference.adapter=none: there would be no answers of the new adapter to hold against the "
                "champion's; set one or the other"
            )
        return self
