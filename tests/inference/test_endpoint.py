"""A real server that misbehaves: dies halfway, asks to wait, answers garbage. Nothing is lost, and nothing waits for ever."""

import dataclasses
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError

from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.settings import EndpointSettings, InferenceSettings
from tasks.dataset.rendering.family import FAMILIES, encode_prompt
from tasks.inference.endpoint import Endpoint, EndpointError
from tests.dataset.reading import BYTES

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOLS = ({"name": "f", "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},)
EXAMPLES = [Example(str(i), (Message("user", f"question {i}"),), TOOLS, (), "", "s", "test") for i in range(40)]
FAMILY = FAMILIES["smollm2"]


class Tokens:
    """The tokenizer of the tests with transformers' interface: a token a byte."""

    def __call__(self, text, **_):
        return {"input_ids": BYTES.encode(text).ids}

    def convert_tokens_to_ids(self, token):
        return 7


@pytest.fixture
def server():
    """An OpenAI-compatible server; ``server.misbehave`` may answer a request in its place."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.seen.append((self.path, body, self.headers.get("Authorization")))
                server.under_way += 1
                server.most = max(server.most, server.under_way)
                number = len(server.seen)
            try:
                if server.misbehave(self, number, body):
                    return
                text = {"text": CALL, "finish_reason": "stop"}
                calls = [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
                message = {"message": {"content": None, "tool_calls": calls}, "finish_reason": "tool_calls"}
                choice = text if self.path.endswith("/v1/completions") else message
                self.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 9}})
            finally:
                with server.lock:
                    server.under_way -= 1

        def reply(self, status, value, **headers):
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name.replace("_", "-"), text)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.lock, server.seen, server.under_way, server.most = threading.Lock(), [], 0, 0
    server.misbehave = lambda handler, number, body: False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def endpoint(server, **settings) -> Endpoint:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    values = {"max_concurrency": 8, "max_retries": 4, "timeout_s": 30, "first_pause_s": 0.01} | settings
    return Endpoint(
        EndpointSettings(url=url, original="base", finetuned="tuned", **values), "base", Tokens(), FAMILY, 32
    )


def asked(endpoint: Endpoint, examples=EXAMPLES):
    found = []
    endpoint.ask(examples, found.append)
    return found


def test_the_server_is_sent_the_ids_that_training_taught_and_every_answer_is_read(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the-key")
    # Nobody is answered until as many are there as may be under way.
    full = threading.Barrier(8, timeout=30)
    server.misbehave = lambda handler, number, body: full.wait() < 0
    predictions = asked(endpoint(server))
    assert sorted(p.example_id for p in predictions) == sorted(e.id for e in EXAMPLES)
    assert all(p.strict.calls == (Call("f", {"a": 1}),) and p.num_new_tokens == 9 for p in predictions)
    sent = {tuple(body["prompt"]) for _, body, _ in server.seen}
    assert sent == {tuple(encode_prompt(Tokens(), FAMILY, e)) for e in EXAMPLES}
    assert {key for _, _, key in server.seen} == {"Bearer the-key"}
    assert server.most == 8


def test_drawn_answers_ask_for_a_seed_each_and_greedy_ones_for_none(server):
    asked(endpoint(server), EXAMPLES[:1])
    (_, body, _) = server.seen.pop()
    assert body["temperature"] == 0
    assert "seed" not in body
    asked(dataclasses.replace(endpoint(server), temperature=0.7, seed=3))
    assert {body["temperature"] for _, body, _ in server.seen} == {0.7}
    assert len({body["seed"] for _, body, _ in server.seen}) == len(EXAMPLES)


def test_chat_reads_the_calls_that_the_server_read(server):
    (prediction,) = asked(endpoint(server, api="chat"), EXAMPLES[:1])
    assert prediction.strict.calls == (Call("f", {"a": 1}),)
    path, body, _ = server.seen[0]
    assert path == "/v1/chat/completions"
    assert body["tools"] == [{"type": "function", "function": TOOLS[0]}]


def test_a_server_that_misbehaves_now_and_then_loses_no_answer_and_none_is_doubled(server):
    tries = Counter()

    def misbehave(handler, number, body):
        with server.lock:
            question = str(body["prompt"])
            tries[question] += 1
            number = tries[question]
        if number == 1:
            handler.reply(429, {"error": "slow down"}, Retry_After="0.05")
        elif number == 2:
            handler.reply(200, b"<html>bad gateway</html>")
        elif number == 3:
            handler.close_connection = True
            handler.connection.close()
        elif number == 4:
            handler.reply(200, {"choices": []})
        else:
            return False
        return True

    server.misbehave = misbehave
    predictions = asked(endpoint(server, max_retries=4))
    assert Counter(p.example_id for p in predictions) == Counter(e.id for e in EXAMPLES)
    assert set(tries.values()) == {5}


def test_a_server_that_dies_halfway_ends_the_stage_and_keeps_what_it_answered(server):
    server.misbehave = lambda handler, number, body: number > 10 and not handler.reply(503, {"error": "dying"})
    kept = []
    with pytest.raises(EndpointError, match=r"no answer to \d+ in 2 tries: status 503.*what was answered is kept"):
        endpoint(server, max_retries=1).ask(EXAMPLES, kept.append)
    assert len(kept) == 10


def test_a_refusal_is_told_at_once_with_the_servers_words_and_without_the_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the-key")
    server.misbehave = lambda handler, number, body: not handler.reply(404, {"error": "no model base"})
    with pytest.raises(EndpointError, match=r"status 404: .*no model base.*Is the model 'base' served") as raised:
        asked(endpoint(server, max_concurrency=1))
    assert "the-key" not in str(raised.value)
    assert len(server.seen) == 1


def test_an_endless_answer_is_cut_off(server):
    server.misbehave = lambda handler, number, body: not handler.reply(200, b"x" * (9 * 2**20))
    with pytest.raises(EndpointError, match="more than 8388608 bytes"):
        asked(endpoint(server, max_retries=0), EXAMPLES[:1])


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ({"message": {"tool_calls": [{"function": {"name": "f", "arguments": "{'a': 1}"}}]}}, "arguments are not JSON"),
        ({"message": {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}}, "arguments an object"),
    ],
)
def test_a_servers_call_that_is_none_is_wrong_and_not_dropped(server, choice, error):
    server.misbehave = lambda handler, number, body: not handler.reply(200, {"choices": [choice], "usage": None})
    (prediction,) = asked(endpoint(server, api="chat"), EXAMPLES[:1])
    assert error in prediction.strict.error


def test_engine_and_endpoint_belong_together_and_a_url_holds_no_password():
    with pytest.raises(ValidationError, match="openai needs"):
        InferenceSettings(engine="openai")
    with pytest.raises(ValidationError, match="url"):
        EndpointSettings(url="http://me:secret@host/v1", original="a", finetuned="b")
