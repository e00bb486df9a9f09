"""A small completions endpoint in the shape of `vllm serve`, for tests: answers, models and refusals as such a server words them, and faults on demand.

    with Endpoint() as e: ask(e.url, ...)

Without `write` it makes up tokens from the prompt and the seed: the same for both, in whatever order it is asked."""
import hashlib
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

EOS = 2


def made_up(prompt, seed, max_tokens):
    "Token ids from a prompt and a seed, ending with EOS where there is room for it"
    draw = random.Random(hashlib.sha256(json.dumps([prompt, seed]).encode()).digest())
    ids = [draw.randrange(100, 300) for _ in range(draw.randrange(1, 12))] + [EOS]
    return ids[:max_tokens]


def error(status, message, kind="BadRequestError", param=None):
    return status, dict(error=dict(message=message, type=kind, param=param, code=status))


class Endpoint(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(
        self,
        model="tiny",  # the name it serves
        max_model_len=256,  # tokens of prompt and completion
        key=None,  # the bearer token it wants
        write=made_up,  # prompt, seed, max_tokens -> ids
        decode=lambda ids: " ".join(map(str, ids)),  # ids without the one it stopped at -> text
        stop=(EOS,),  # ids that end a completion
        delay=lambda number: 0.0,  # seconds before the answer to the n-th request
        faults=(),  # for the first requests: (status, answer), "cut" (half an answer) or "hang"
        ids=True,  # takes token ids
        most=None,  # completions it gives at most, whatever n says
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.max_model_len, self.key, self.write, self.decode, self.stop_ids = model, max_model_len, key, write, decode, set(stop)
        self.delay, self.faults, self.ids, self.most = delay, list(faults), ids, most
        self.asked, self.at_once, self.highest, self.lock = [], 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):  # a client that has gone
        pass

    def models(self):
        return 200, dict(object="list", data=[dict(id=self.model, object="model", created=0, owned_by="vllm", root=self.model, max_model_len=self.max_model_len)])

    def complete(self, body):
        prompt, n, room = body["prompt"], body.get("n", 1), body.get("max_tokens", 16)
        if body.get("model") != self.model:
            return error(404, f"The model `{body.get('model')}` does not exist.", "NotFoundError", "model")
        if not (isinstance(prompt, list) and all(isinstance(i, int) for i in prompt)) or not self.ids:
            return 400, dict(detail="prompt must be a string.")
        if len(prompt) + room > self.max_model_len:
            return error(400, f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {room} output tokens and your prompt contains "
                              f"{len(prompt)} input tokens, for a total of {len(prompt) + room} tokens.")
        choices = []
        for index in range(min(n, self.most or n)):
            ids = self.write(prompt, body["seed"] + index, room)  # as vLLM does: the seed of a further completion is one more
            ended = ids[-1] in self.stop_ids
            choices.append(dict(index=index, text=self.decode(ids[:-1] if ended else ids), logprobs=None, finish_reason="stop" if ended else "length", stop_reason=None,
                                token_ids=ids if body.get("return_token_ids") else None, prompt_token_ids=prompt if body.get("return_token_ids") else None))
        wrote = sum(len(self.write(prompt, body["seed"] + i, room)) for i in range(len(choices)))
        usage = dict(prompt_tokens=len(prompt), completion_tokens=wrote, total_tokens=len(prompt) + wrote)
        return 200, dict(id="cmpl-0", object="text_completion", created=0, model=self.model, choices=choices[::-1], usage=usage)  # not in order


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        s = self.server
        with s.lock:
            number, fault = len(s.asked), s.faults.pop(0) if body and s.faults else None
            if body:
                s.asked.append(body)
                s.at_once += 1
                s.highest = max(s.highest, s.at_once)
        if body:
            time.sleep(s.delay(number))
        told = self.reply(body, fault)
        if body:
            with s.lock:
                s.at_once -= 1  # before the answer goes out: whoever gets it may ask again at once
        self.send(*told, cut=fault == "cut")

    def reply(self, body, fault):
        s = self.server
        if s.key and self.headers.get("Authorization") != f"Bearer {s.key}":
            return 401, dict(error="Unauthorized")
        if fault == "hang":
            time.sleep(5)
        if isinstance(fault, tuple):
            return fault
        if self.path == "/v1/models":
            return s.models()
        return s.complete(body) if self.path == "/v1/completions" else (404, dict(detail="Not Found"))

    def send(self, status, answer, cut=False):
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut
