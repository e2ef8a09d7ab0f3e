"""What the tests take for vLLM where that is not installed: its command line, health check, names, key and second process.

``python fake_vllm.py -m vllm.entrypoints.openai.api_server ...``; FAKE_VLLM in the environment says how it fails, and
FAKE_VLLM_ENGINE what its second process is known by.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("-m")
for name in ("model", "served-model-name", "dtype", "host", "generation-config", "lora-modules"):
    parser.add_argument(f"--{name}")
for name in ("port", "max-model-len", "max-num-seqs", "max-lora-rank"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--gpu-memory-utilization", type=float)
parser.add_argument("--enable-lora", action="store_true")
arguments = parser.parse_args()
assert arguments.m == "vllm.entrypoints.openai.api_server"
fails = os.environ.get("FAKE_VLLM", "")
if fails == "at the start":
    sys.exit("no kernel image is available")
# The real one's engine, which a killed server leaves behind.
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", os.environ["FAKE_VLLM_ENGINE"]])
names = [arguments.served_model_name]
if arguments.enable_lora:
    names.append(arguments.lora_modules.split("=")[0])
asked = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(503 if fails == "to serve" else 200, {})

    def do_POST(self):
        global asked
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            return self.reply(401, {"error": "Unauthorized"})
        if body["model"] not in names:
            return self.reply(404, {"error": f"no model {body['model']}"})
        asked += 1
        if fails == "halfway" and asked > 2:
            print("CUDA error: an illegal memory access", flush=True)
            os._exit(1)
        told = {"arguments": vars(arguments), "environment": dict(os.environ), "prompt": body["prompt"]}
        choice = {"text": json.dumps(told), "finish_reason": "stop"}
        return self.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    def reply(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


time.sleep(0.3)
ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()
