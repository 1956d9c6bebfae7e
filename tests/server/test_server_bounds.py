"""What a client may take of a server, and that no client takes anything from another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from helpers.server import Server, shared_server, special_server

from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.nano import write_checkpoint

LONG = {"prompt": "说", "stream": True, "max_tokens": 900, "ignore_eos": True}


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    parts = urlsplit(server.url)
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect((parts.hostname, parts.port))
    return connection


def request(path: str, body: bytes, length: int | None = None) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def is_closed_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


class TestDisconnects:
    def test_a_hundred_clients_that_leave_in_mid_stream_leave_nothing_behind(self):
        with special_server(delay=0.005, limits={"requests": 300}) as server:
            body = json.dumps(LONG).encode()
            for _ in range(4):
                connections = [connect(server) for _ in range(25)]
                for connection in connections:
                    connection.sendall(request("/generate", body))
                for connection in connections[::2]:
                    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
                assert server.resources()["runningRequestNum"] > 0
                for number, connection in enumerate(connections):
                    if number % 3 == 0:  # a reset instead of an orderly end
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    connection.close()
            found = server.wait_until_idle()
            assert found["freeNpuBlockNums"] == found["totalNpuBlockNums"]
            assert found["runningRequestNum"] == found["waitingRequestNum"] == 0
            lines = server.get("/metrics").text.splitlines()
            assert 'request_failed_total{model_name="null"} 100.0' in lines
            assert server.post("/generate", {"prompt": "x", "max_tokens": 3}).status_code == 200

    def test_a_client_that_leaves_before_its_whole_answer(self):
        with special_server(delay=0.01) as server:
            with pytest.raises(httpx.ReadTimeout), server.client() as client:
                client.post("/generate", json=LONG | {"stream": False}, timeout=0.3)
            found = server.wait_until_idle()
            assert found["freeNpuBlockNums"] == found["totalNpuBlockNums"]

    def test_another_request_can_stop_one(self):
        with special_server(delay=0.01) as server, ThreadPoolExecutor(1) as pool:
            body = {"id": "mine", "text_input": "说", "parameters": {"max_new_tokens": 1000, "details": True}}
            future = pool.submit(server.post, "/v2/models/null/generate", body)
            while server.post("/v2/models/null/stopInfer", {"id": "mine"}).status_code == 500:
                time.sleep(0.01)
            assert future.result().json()["details"]["finish_reason"] == "stop_sequence"


class TestSlowClients:
    def test_headers_bodies_and_silence(self):
        with special_server(limits={"header_seconds": 0.5, "body_seconds": 0.5}) as server:
            silent, dripping, bodiless = connect(server), connect(server), connect(server)
            dripping.sendall(b"POST /generate HTTP/1.1\r\nHost: lo")
            bodiless.sendall(request("/generate", b"{", length=100))
            assert bodiless.recv(4096).startswith(b"HTTP/1.1 408")
            assert is_closed_within(silent, 5) and is_closed_within(dripping, 5)
            assert server.post("/generate", {"prompt": "x", "max_tokens": 1}).status_code == 200

    def test_a_client_that_does_not_read_is_dropped(self):
        with special_server(blocks=3000, limits={"write_seconds": 0.5}, engine={"max_seq_len": 1024}) as server:
            connection = connect(server, receive_buffer=4096)
            # 128 answers of which each event repeats all positions: more than the kernel's buffers hold.
            body = LONG | {"n": 128, "temperature": 1.0}
            connection.sendall(request("/generate", json.dumps(body).encode()))
            give_up = time.monotonic() + 20
            while server.resources()["runningRequestNum"] == 0 and time.monotonic() < give_up:
                time.sleep(0.01)
            found = server.wait_until_idle(20)
            assert found["freeNpuBlockNums"] == found["totalNpuBlockNums"]
            assert 'request_failed_total{model_name="null"} 1.0' in server.get("/metrics").text


class TestSizes:
    def test_bodies(self):
        with special_server(limits={"body_bytes": 1000}) as server:
            assert server.post("/generate", b"{" + b" " * 2000).status_code == 413
            with server.client() as client:  # without a length that could be looked at first
                response = client.post("/generate", content=iter([b" " * 600] * 3))
            assert response.status_code == 413 and response.json()["error_type"] == "Payload Too Large"
            assert server.post("/generate", {"prompt": "x", "max_tokens": 1}).status_code == 200

    def test_headers(self):
        server = shared_server()
        with connect(server) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * (1 << 20))
            assert is_closed_within(connection, 5)
        assert server.get("/health").status_code == 200

    @pytest.mark.parametrize("raw", [b"\0" * 100 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"])
    def test_what_is_no_http(self, raw):
        server = shared_server()
        with connect(server) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            assert is_closed_within(connection, 5)
        assert server.get("/health").status_code == 200


class TestFull:
    def test_a_full_server_refuses_and_stays_healthy(self):
        with special_server(delay=0.01, limits={"requests": 4}) as server, ThreadPoolExecutor(12) as pool:
            body = {"prompt": "说", "max_tokens": 100, "ignore_eos": True}
            answers = list(pool.map(lambda _: server.post("/generate", body), range(12)))
            statuses = [answer.status_code for answer in answers]
            assert statuses.count(200) >= 4 and statuses.count(503) == 12 - statuses.count(200) > 0
            refused = next(answer for answer in answers if answer.status_code == 503)
            assert refused.json()["error_type"] == "Service Unavailable" and refused.headers["retry-after"]
            assert server.get("/health").status_code == 200
            assert server.post("/generate", body).status_code == 200

    def test_a_full_queue_of_the_engine(self):
        with special_server(
            delay=0.01, engine={"max_waiting": 3, "max_batch_size": 1, "max_prefill_batch_size": 1}
        ) as server:
            body = {"prompt": "说", "n": 100, "temperature": 1.0, "max_tokens": 5}
            assert server.post("/generate", body).status_code == 503
            found = server.wait_until_idle()
            assert found["waitingRequestNum"] == found["runningRequestNum"] == 0

    def test_ready_tells_of_a_busy_server(self):
        with (
            special_server(delay=0.02, engine={"max_batch_size": 1, "max_prefill_batch_size": 1}) as server,
            ThreadPoolExecutor(2) as pool,
        ):
            futures = [pool.submit(server.post, "/generate", LONG | {"max_tokens": 30}) for _ in range(2)]
            while server.resources()["waitingRequestNum"] == 0:
                time.sleep(0.01)
            assert server.get("/v2/health/ready").status_code == 503
            assert server.get("/v2/health/live").status_code == 200
            assert server.get("/health/timed-30").status_code == 200
            assert all(future.result().status_code == 200 for future in futures)


class TestTimeouts:
    def test_the_clients_own(self):
        with special_server(delay=0.05) as server:
            parameters = {"timeout": 1, "max_new_tokens": 1000}
            response = server.post("/infer", {"inputs": "说", "parameters": parameters})
            assert response.status_code == 500
            assert response.json()["error"] == "Engine callback timeout: client timeout"
            events = server.post("/infer", {"inputs": "说", "stream": True, "parameters": parameters}).text
            assert json.loads(events.split("data: ")[-1])["error"] == "Engine callback timeout: client timeout"
            assert server.wait_until_idle()["runningRequestNum"] == 0

    @pytest.mark.parametrize(
        ("limits", "whose"), [({"token_seconds": 0.2}, "tokenTimeout"), ({"request_seconds": 0.2}, "e2eTimeout")]
    )
    def test_the_servers(self, limits, whose):
        with special_server(delay=0.5, limits=limits) as server:
            response = server.post("/generate", {"prompt": "说", "max_tokens": 50, "ignore_eos": True})
            assert response.status_code == 500
            assert response.json() == {
                "error": f"Engine callback timeout: server {whose}",
                "error_type": "Incomplete Generation",
            }
            assert server.wait_until_idle()["freeNpuBlockNums"] == 399


class TestBrowsers:
    """Pages of other sites must not drive a server on the user's own machine."""

    @pytest.mark.parametrize(
        "headers",
        [
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://evil.example", "Host": "evil.example"},
            {"Sec-Fetch-Site": "same-origin", "Host": "evil.example:1025"},
        ],
    )
    @pytest.mark.parametrize("path", ["/generate", "/stopService"])
    def test_other_pages_are_refused(self, headers, path):
        server = shared_server()
        response = (
            server.get(path, headers=headers) if path == "/stopService" else server.post(path, {}, headers=headers)
        )
        assert response.status_code == 403

    def test_its_own_page_and_other_clients_are_not(self):
        server = shared_server()
        origin = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
        for headers in ({}, {"Host": "service.internal"}, {"Sec-Fetch-Site": "none"}, origin):
            assert server.post("/v1/tokenizer", {"inputs": "x"}, headers=headers).status_code == 200

    def test_the_page_comes_with_a_policy(self):
        response = shared_server().get("/")
        assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"


def test_bad_requests_do_not_hurt_good_ones():
    server = shared_server()
    good = {"inputs": "生抽与老抽的区别？", "parameters": {"do_sample": False, "max_new_tokens": 40}}
    expected = server.post("/generate", good).json()
    bad = [
        b"{",
        b"\xff",
        json.dumps({"inputs": "x" * 100_000}).encode(),
        json.dumps({"inputs": "x", "parameters": {"repetition_penalty": 1e-38, "do_sample": True}}).encode(),
        json.dumps({"prompt": "x", "temperature": 1e-38, "top_k": 2**31 - 1, "logit_bias": {}}).encode(),
        json.dumps({"prompt": "x", "repetition_penalty": 3e38, "presence_penalty": -2, "top_p": 1e-300}).encode(),
        json.dumps({"prompt": "x", "n": 32, "temperature": 1.0, "max_tokens": 2}).encode(),
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.post, "/generate", good) for _ in range(6)]
        others = [pool.submit(server.post, "/generate", raw) for raw in bad * 2]
        assert all(answer.result().json() == expected for answer in answers)
        assert all(other.result().status_code in (200, 422, 424) for other in others)
    found = server.wait_until_idle()
    assert found["freeNpuBlockNums"] == found["totalNpuBlockNums"]


def test_the_loop_answers_while_the_engine_computes():
    with special_server(delay=0.5) as server:
        worker = threading.Thread(target=lambda: server.post("/generate", {"prompt": "x", "max_tokens": 3}))
        worker.start()
        while server.resources()["runningRequestNum"] == 0:
            time.sleep(0.01)
        begin = time.monotonic()
        assert server.get("/health").status_code == 200
        assert time.monotonic() - begin < 0.4
        worker.join()


@pytest.mark.slow
def test_sixty_four_requests_together_answer_as_each_alone(tmp_path):
    """Greedy answers of all formats, mixed with sampled ones, equal those of the same requests one after the other.

    Keys and values are float32 here. In 16 bits a sum's last bit, which depends on the batch, can round a key the other
    way, and where two tokens are about as likely, a greedy answer goes on with the other.
    """
    write_checkpoint(tmp_path / "checkpoint")
    build(tmp_path / "model", tmp_path / "checkpoint", BuildOptions(dtype="float32"))
    words = ["生抽与老抽的区别？", "你好", "中国电信是做什么的？", "1+1=", "写一首诗", "How are you?", "床前明月光，"]
    requests = []
    for number in range(64):
        text, length = words[number % len(words)] * (1 + number % 3), 5 + 7 * (number % 8)
        greedy = number % 4 != 3
        if number % 3 == 0:
            parameters = {"max_new_tokens": length, "do_sample": not greedy, "seed": number}
            requests.append(("/generate", {"inputs": text, "parameters": parameters}, greedy))
        elif number % 3 == 1:
            body = {"prompt": text, "max_tokens": length, "temperature": 0 if greedy else 0.9, "seed": number}
            requests.append(("/generate", body | {"repetition_penalty": 1.2 if number % 2 else 1.0}, greedy))
        else:
            body = {"model": "model", "messages": [{"role": "user", "content": text}], "max_tokens": length}
            body |= {"temperature": 0 if greedy else 1.5, "seed": number, "stop": ["。"]}
            requests.append(("/v1/chat/completions", body, greedy))

    async def ask(client, path, body):
        answer = (await client.post(path, json=body)).json()
        if "choices" in answer:
            return answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]
        return answer

    async def run(url):
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False) as client:
            alone = [await ask(client, path, body) for path, body, _ in requests]
            together = await asyncio.gather(*(ask(client, path, body) for path, body, _ in requests))
        return alone, together

    with Server([sys.executable, "-m", "telechat_mindie", "serve", str(tmp_path / "model"), "--port", "0"]) as server:
        alone, together = asyncio.run(run(server.url))
    wrong = [
        n
        for n, (one, other, item) in enumerate(zip(alone, together, requests, strict=True))
        if item[2] and one != other
    ]
    assert not wrong, [(requests[n], alone[n], together[n]) for n in wrong[:3]]
