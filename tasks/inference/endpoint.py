"""Examples to predictions through an OpenAI-compatible server: many requests at once, none lost, none asked for ever.

``completions`` sends the token ids that training taught and reads the text with the family's own parser: what is asked is the
same as with our own engine. ``chat`` lets the server render messages and tools and read the calls itself: an engine of its own,
whose answers are never compared with others. The key comes from the environment, ``OPENAI_API_KEY``, unless one is given.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.prediction import Prediction, Reading
from tasks.contracts.settings import EndpointSettings
from tasks.dataset.rendering.family import Family, encode_prompt
from tasks.dataset.rendering.json_calls import as_call, read_leniently
from tasks.dataset.rendering.strict_json import STRICT
from tasks.inference.sampling import seed_of

MAX_ANSWER_BYTES = 8 * 2**20
LONGEST_PAUSE_S = 60.0
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses that another try may get past; others say that the request itself is refused."""


class EndpointError(RuntimeError):
    """The server cannot be used, or gave no usable answer after every try. What was answered before is on disk."""


class _Passing(Exception):
    """What may be otherwise at the next try; ``wait_s`` is the server's own wish."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        self.wait_s = wait_s
        super().__init__(what)


@dataclass
class _Pace:
    """When the next request may leave: all wait together, for the rate and for what a 429 asked for."""

    interval_s: float
    next_at: float = 0.0

    async def turn(self) -> None:
        now = time.monotonic()
        self.next_at = max(self.next_at, now)
        at, self.next_at = self.next_at, self.next_at + self.interval_s
        await asyncio.sleep(at - now)

    def hold(self, seconds: float) -> None:
        self.next_at = max(self.next_at, time.monotonic() + seconds)


@dataclass(frozen=True)
class Endpoint:
    """One model behind one server.

    Attributes:
        model: its name there.
        max_new_tokens: longest answer.
        temperature, seed: 0 is greedy; above, the server is given a seed for each request, and draws as it likes to.
        key: the server's; None: ``OPENAI_API_KEY``, where it is set.
    """

    settings: EndpointSettings
    model: str
    tokenizer: Any
    family: Family
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    key: str | None = field(default=None, repr=False)

    def ask(self, examples: Sequence[Example], on_prediction: Callable[[Prediction], None]) -> None:
        """Put every example to the server; answers come in an order of their own.

        Raises:
            EndpointError: after the tries that the settings allow, or at once where the server refuses.
        """
        try:
            asyncio.run(self._ask_all(examples, on_prediction))
        except* EndpointError as group:
            # One is enough to say why; the others were cancelled or fail of the same.
            raise group.exceptions[0] from None

    async def _ask_all(self, examples: Sequence[Example], on_prediction: Callable[[Prediction], None]) -> None:
        rate = self.settings.requests_per_s
        pace, room = _Pace(1 / rate if rate else 0.0), asyncio.Semaphore(self.settings.max_concurrency)
        key = self.key or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self.settings.max_concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=self.settings.timeout_s, limits=limits) as client:

            async def one(example: Example) -> None:
                async with room:
                    on_prediction(await self._answer(client, pace, example))

            async with asyncio.TaskGroup() as group:
                for example in examples:
                    group.create_task(one(example))

    async def _answer(self, client: httpx.AsyncClient, pace: _Pace, example: Example) -> Prediction:
        """One example's answer, however many tries it takes within the limit."""
        path, body, num_prompt_tokens = self._request(example)
        for attempt in range(self.settings.max_retries + 1):
            await pace.turn()
            began = time.perf_counter()
            try:
                answer = await self._post(client, path, body)
                return self._prediction(example, answer, num_prompt_tokens, time.perf_counter() - began)
            except _Passing as problem:
                last = str(problem)
                growing = self.settings.first_pause_s * 2**attempt
                wait_s = min(LONGEST_PAUSE_S, growing if problem.wait_s is None else problem.wait_s)
                if problem.wait_s is not None:
                    pace.hold(wait_s)
                if attempt < self.settings.max_retries:
                    await asyncio.sleep(wait_s)
        raise EndpointError(
            f"{self.settings.url}{path} gave no answer to {example.id} in {self.settings.max_retries + 1} tries: {last}. Start "
            "the run again under its name when the server is well: what was answered is kept"
        )

    def _request(self, example: Example) -> tuple[str, dict[str, Any], int]:
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
        }
        if self.temperature:
            body["seed"] = seed_of(self.seed, example.id)
        if self.settings.api == "chat":
            tools = [{"type": "function", "function": tool} for tool in example.tools]
            messages = [_as_chat(message) for message in example.messages]
            return "/chat/completions", body | {"messages": messages} | ({"tools": tools} if tools else {}), 0
        ids = encode_prompt(self.tokenizer, self.family, example)
        end = self.tokenizer.convert_tokens_to_ids(self.family.end_of_turn)
        return "/completions", body | {"prompt": ids, "stop_token_ids": [end]}, len(ids)

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
        try:
            async with client.stream("POST", self.settings.url.rstrip("/") + path, json=body) as response:
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_ANSWER_BYTES:
                        raise _Passing(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        except httpx.HTTPError as error:
            raise _Passing(f"{type(error).__name__} {error}".strip()) from error
        text = content.decode("utf-8", errors="replace")
        if response.status_code in TRY_AGAIN:
            raise _Passing(f"status {response.status_code}: {text[:200]!r}", _retry_after(response))
        if response.status_code != 200:
            raise EndpointError(
                f"{self.settings.url}{path} refuses with status {response.status_code}: {text[:300]!r}. Is the model "
                f"{self.model!r} served there, and is OPENAI_API_KEY right?"
            )
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Passing(f"an answer that is not JSON: {text[:200]!r}") from error

    def _prediction(self, example: Example, answer: Any, num_prompt_tokens: int, latency_s: float) -> Prediction:
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            is_chat = self.settings.api == "chat"
            text = (choice["message"].get("content") or "") if is_chat else choice["text"]
            if not isinstance(text, str):
                raise TypeError(f"the text is {type(text).__name__}")
            strict = (
                _read_chat(choice["message"].get("tool_calls") or []) if is_chat else self.family.parse(text.strip())
            )
            num_new_tokens = usage.get("completion_tokens")
            return Prediction(
                example_id=example.id,
                text=text,
                strict=strict,
                lenient=strict if strict.calls else read_leniently(text),
                num_prompt_tokens=int(usage.get("prompt_tokens") or num_prompt_tokens),
                num_new_tokens=int(self._count(text) if num_new_tokens is None else num_new_tokens),
                was_cut=choice.get("finish_reason") == "length",
                latency_s=latency_s,
            )
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise _Passing(f"an answer of another form ({error!r}): {str(answer)[:200]}") from error

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _as_chat(message: Message) -> dict[str, Any]:
    if not message.calls:
        return {"role": message.role, "content": message.content}
    calls = [
        {"id": f"call{i:05}", "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
        for i, c in enumerate(message.calls, start=1)
    ]
    return {"role": message.role, "content": None, "tool_calls": calls}


def _read_chat(tool_calls: Any) -> Reading:
    """The calls that a server has read from an answer itself."""
    calls: list[Call] = []
    for entry in tool_calls:
        function = entry["function"]
        try:
            arguments = STRICT.decode(function["arguments"] or "{}")
        except (ValueError, RecursionError) as error:
            return Reading((), f"arguments are not JSON: {error}")
        call = as_call({"name": function["name"], "arguments": arguments}, arguments_key="arguments")
        if isinstance(call, str):
            return Reading((), call)
        calls.append(call)
    return Reading(tuple(calls))


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait, where it says so in seconds."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
