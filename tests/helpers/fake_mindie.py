"""A stand-in for a running service: MindIE's streaming routes, with answers, speed and faults as a test wants them."""

from __future__ import annotations

import json
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from telechat_mindie.server.page import PAGE_HEADERS, page_files

_STREAMS = {"/v1/chat/completions": "_chat", "/v1/completions": "_completion", "/generate_stream": "_tgi"}


@dataclass
class FakeMindie:
    """Serves on a free port inside `with`. A token is a piece of the answer, or a character of a prompt."""

    has_page: bool = False  # also serves the chat page
    pieces: list[str] = field(default_factory=lambda: ["你", "好", "，世界"])
    thoughts: list[str] = field(default_factory=list)  # come before the pieces, in a chat as reasoning_content
    delay: float = 0.0  # seconds before each piece
    hold: threading.Event | None = None  # what comes behind the first piece waits for it
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> status and body, in the answer's place
    usage: bool = True
    broken: bool = False  # the connection ends after the first piece
    tls: ssl.SSLContext | None = None
    running: int = 0
    requests: list[tuple[str, dict]] = field(default_factory=list)
    disconnects: int = 0
    peak: int = 0
    generated: int = 0

    def __enter__(self):
        outer = self

        class Handler(_Handler):
            fake = outer

        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        scheme = "http" if self.tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def bodies(self, path):
        with self._lock:
            return [body for asked, body in self.requests if asked == path]

    def count(self, change):
        with self._lock:
            self.running += change
            self.peak = max(self.peak, self.running)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeMindie

    def log_message(self, *_):
        pass

    def do_GET(self):
        fake = self.fake
        if self.path in fake.faults:
            self._send(*fake.faults[self.path])
        elif fake.has_page and self.path in page_files():
            content, kind = page_files()[self.path]
            self._send(200, content.decode(), kind, PAGE_HEADERS)
        elif self.path == "/v1/models":
            self._send(200, json.dumps({"object": "list", "data": [{"id": "fake", "object": "model"}]}))
        elif self.path == "/metrics":
            lines = (
                "# TYPE num_requests_running gauge",
                f'num_requests_running{{model_name="fake"}} {fake.running}',
                'num_requests_waiting{model_name="fake"} 2',
                'npu_cache_usage_perc{model_name="fake"} 0.125',
                f'generation_tokens_total{{model_name="fake"}} {fake.generated}',
            )
            self._send(200, "\n".join(lines) + "\n", "text/plain; version=0.0.4")
        else:
            self._send(404, json.dumps({"error": "no such route", "error_type": "NotFoundError"}))

    def do_POST(self):
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake._lock:
            fake.requests.append((self.path, body))
        if self.path in fake.faults:
            self._send(*fake.faults[self.path])
        elif self.path == "/v1/tokenizer":
            self._send(200, json.dumps({"token_number": len(body["inputs"])}))
        elif self.path in _STREAMS:
            fake.count(1)
            try:
                self._stream(getattr(self, _STREAMS[self.path])(body))
            except OSError:
                with fake._lock:
                    fake.disconnects += 1
                self.close_connection = True
            finally:
                fake.count(-1)
        else:
            self._send(404, json.dumps({"error": "no such route", "error_type": "NotFoundError"}))

    def _pieces(self, most):
        pieces = [*self.fake.thoughts, *self.fake.pieces]
        count = len(pieces) if most is None else min(most, len(pieces))
        for number, piece in enumerate(pieces[:count], 1):
            time.sleep(self.fake.delay)
            with self.fake._lock:
                self.fake.generated += 1
            reason = None
            if number == count:
                reason = "stop" if count == len(pieces) else "length"
            yield number, piece, reason
            if number == 1 and self.fake.hold is not None:
                self.fake.hold.wait(60)

    def _chat(self, body):
        prompt = sum(len(message["content"]) for message in body["messages"])
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield json.dumps({**chunk, "choices": [first]})
        for number, piece, reason in self._pieces(body.get("max_tokens")):
            name = "reasoning_content" if number <= len(self.fake.thoughts) else "content"
            choice = {"index": 0, "delta": {"role": "assistant", name: piece}, "finish_reason": reason}
            usage = {"prompt_tokens": prompt, "completion_tokens": number, "total_tokens": prompt + number}
            yield json.dumps({**chunk, "choices": [choice], **({"usage": usage} if reason and self.fake.usage else {})})
        yield "[DONE]"

    def _completion(self, body):
        chunk = {"id": "1", "object": "text_completion", "created": 1, "model": body["model"]}
        for number, piece, reason in self._pieces(body.get("max_tokens")):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": number}
            choice = {"index": 0, "text": piece, "logprobs": None, "finish_reason": reason}
            yield json.dumps({**chunk, "choices": [choice], **({"usage": usage} if reason and self.fake.usage else {})})
        yield "[DONE]"

    def _tgi(self, body):
        text = ""
        for number, piece, reason in self._pieces(body["parameters"].get("max_new_tokens")):
            text += piece
            details = {"prompt_tokens": len(body["inputs"]), "finish_reason": reason, "generated_tokens": number}
            event = {"token": {"id": [number], "text": piece, "logprob": None, "special": None}}
            event |= {"generated_text": text if reason else None, "details": details if reason else None}
            yield json.dumps(event)

    def _stream(self, events):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, event in enumerate(events):
            if self.fake.broken and number == 2:
                raise BrokenPipeError
            self._chunk(f"data: {event}\n\n".encode())
        self._chunk(b"")

    def _chunk(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def _send(self, status, text, kind="application/json", headers=()):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
