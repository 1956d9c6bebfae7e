"""The server as a process: its end, its ports, TLS, and MindIE's conf/config.json."""

from __future__ import annotations

import datetime
import ipaddress
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import pytest
from helpers.server import Server, nano_directory, shared_server, special_server

from telechat_mindie.service.schema import default_config

QUESTION = "生抽与老抽的区别？"


def stream_events(server: Server, seconds: float, started: threading.Event) -> list[dict]:
    """Events of a long answer, until it ends."""
    body = {"inputs": "说", "parameters": {"max_new_tokens": int(seconds * 50), "details": True}}
    events = []
    with server.client() as client, client.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: "):
                started.set()
                events.append(json.loads(line.removeprefix("data: ")))
    return events


class TestEnd:
    def test_sigterm_lets_answers_finish_and_refuses_new_ones(self):
        with special_server(delay=0.02) as server, ThreadPoolExecutor(4) as pool:
            started = threading.Event()
            futures = [pool.submit(stream_events, server, 1.0, started) for _ in range(3)]
            assert started.wait(20)
            url = server.url
            server.process.send_signal(signal.SIGTERM)
            refused = None
            while refused is None:  # the port stays open, to say so
                response = httpx.post(f"{url}/generate", json={"prompt": "x", "max_tokens": 1}, trust_env=False)
                refused = response if response.status_code != 200 else None
            assert refused.status_code == 503 and "stopped" in refused.json()["error"]
            assert httpx.get(f"{url}/health", trust_env=False).status_code == 503
            for future in futures:
                assert future.result()[-1]["details"]["generated_tokens"] == 50
            assert server.wait() == 0
            assert "Traceback" not in server.output

    def test_answers_that_need_too_long_say_so(self):
        with special_server(delay=0.02, limits={"drain_seconds": 0.3}) as server, ThreadPoolExecutor(2) as pool:
            started = threading.Event()
            stream = pool.submit(stream_events, server, 20.0, started)
            body = {"inputs": "说", "parameters": {"max_new_tokens": 1000}}
            whole = pool.submit(server.post, "/generate", body)
            assert started.wait(20)
            begin = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - begin < 5
            assert stream.result()[-1] == {
                "error": "The service has been stopped.",
                "error_type": "Service Unavailable",
            }
            assert whole.result().status_code == 503

    def test_a_second_signal_does_not_wait(self):
        with special_server(delay=0.02) as server, ThreadPoolExecutor(1) as pool:
            started = threading.Event()
            stream = pool.submit(stream_events, server, 100.0, started)
            assert started.wait(20)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            assert server.process.poll() is None
            assert server.stop(signal.SIGTERM, 10) == 0
            assert stream.result()[-1]["error_type"] == "Service Unavailable"

    def test_stop_service_answers_when_all_is_done(self):
        with special_server(delay=0.02) as server, ThreadPoolExecutor(1) as pool:
            started = threading.Event()
            stream = pool.submit(stream_events, server, 0.6, started)
            assert started.wait(20)
            assert server.get("/stopService").status_code == 200
            assert stream.result()[-1]["details"]["generated_tokens"] == 30
            assert server.wait(10) == 0

    def test_stop_service_by_force(self):
        with special_server(delay=0.02) as server, ThreadPoolExecutor(1) as pool:
            started = threading.Event()
            stream = pool.submit(stream_events, server, 100.0, started)
            assert started.wait(20)
            assert server.get("/stopService?mode=Force").status_code == 200
            assert server.wait(10) == 0
            assert stream.result()[-1]["error_type"] == "Service Unavailable"

    def test_sigterm_in_the_middle_of_real_answers(self):
        command = [sys.executable, "-m", "telechat_mindie", "serve", str(nano_directory()), "--port", "0"]
        body = {"inputs": QUESTION, "parameters": {"do_sample": False, "max_new_tokens": 512}}
        expected = shared_server().post("/generate", body).json()
        with Server(command) as server, ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(server.post, "/generate", body) for _ in range(8)]
            while server.resources()["runningRequestNum"] == 0:
                time.sleep(0.01)
            assert server.stop() == 0
            answers = [future.result() for future in futures]
        assert all(
            answer.json() == expected if answer.status_code == 200 else answer.status_code == 503 for answer in answers
        )
        assert any(answer.status_code == 200 for answer in answers)
        assert server.lines[-1] == "stopped"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "telechat_mindie", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


class TestRefusals:
    def test_a_port_that_is_taken(self):
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            done = run(str(nano_directory()), "--port", str(holder.getsockname()[1]))
        assert done.returncode == 2 and "is taken by" in done.stderr and "pid" in done.stderr

    def test_an_address_that_is_not_ours(self):
        done = run(str(nano_directory()), "--host", "192.0.2.1")
        assert done.returncode == 2 and "cannot be listened on" in done.stderr

    def test_no_directory(self, tmp_path):
        done = run(str(tmp_path))
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr

    def test_libraries_that_are_not_installed(self):
        code = (
            "import sys; sys.modules['fastapi'] = None; sys.argv = ['telechat-mindie', 'serve', sys.argv[1]]; "
            "from telechat_mindie.__main__ import main; main()"
        )
        command = [sys.executable, "-c", code, str(nano_directory())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "`pip install 'aiohttp>=" in done.stderr and "'fastapi>=" in done.stderr

    def test_a_config_that_mindie_refuses(self, tmp_path):
        config = service_config()
        config["ServerConfig"]["port"] = 80
        config["BackendConfig"]["ScheduleConfig"]["maxBatchSize"] = 0
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        done = run(str(nano_directory()), "--service-config", str(path))
        assert done.returncode == 2 and "port" in done.stderr and "maxBatchSize" in done.stderr


def service_config() -> dict:
    """MindIE's own file, made to fit nano, with free ports."""
    config = default_config("3.0.0.beta")
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for probe in (one, two, three):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (one, two, three)]
    config["ServerConfig"] |= dict(zip(("port", "managementPort", "metricsPort"), ports, strict=True))
    config["ServerConfig"] |= {"httpsEnabled": False, "managementIpAddress": "127.0.0.1", "fullTextEnabled": True}
    backend = config["BackendConfig"]
    backend["npuDeviceIds"] = [[0]]
    backend["ModelDeployConfig"] |= {"maxSeqLen": 256, "maxInputTokenLen": 100, "truncation": True}
    model = backend["ModelDeployConfig"]["ModelConfig"][0]
    model |= {"modelName": "telechat", "modelWeightPath": "/model", "worldSize": 1, "backendType": "ms"}
    model |= {"npuMemSize": 1, "plugin_params": json.dumps({"plugin_type": "prefix_cache"})}
    model.pop("models")
    backend["ScheduleConfig"] |= {"cacheBlockSize": 16, "maxIterTimes": 24}
    return config


class TestServiceConfig:
    def test_the_file_is_honoured(self, tmp_path):
        config = service_config()
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "telechat_mindie", "serve", str(nano_directory())]
        with Server([*command, "--service-config", str(path)]) as server:
            ports = config["ServerConfig"]
            assert server.url == f"http://127.0.0.1:{ports['port']}"
            management, metrics = (f"http://127.0.0.1:{ports[name]}" for name in ("managementPort", "metricsPort"))
            with httpx.Client(trust_env=False) as client:
                # Each route is on its own plane only.
                for path, where in (("/v1/models", server.url), ("/health", management), ("/metrics", metrics)):
                    for url in (server.url, management, metrics):
                        assert client.get(url + path).status_code == (200 if url == where else 404)
                assert client.get(f"{management}/v1/config").json() == {
                    "modelName": "telechat",
                    "maxSeqLen": 256,
                    "npuMemSize": 1,
                    "cpuMemSize": 0,
                    "worldSize": 1,
                    "maxOutputLen": 24,
                    "cacheBlockSize": 16,
                }
                chat = {"model": "telechat", "messages": [{"role": "user", "content": QUESTION}]}
                first = client.post(f"{server.url}/v1/chat/completions", json=chat).json()
                again = client.post(f"{server.url}/v1/chat/completions", json=chat).json()
                assert first["choices"][0]["finish_reason"] == "length"  # maxIterTimes
                assert again["choices"][0]["message"] == first["choices"][0]["message"]
                assert again["usage"]["prompt_tokens_details"]["cached_tokens"] % 16 == 0  # prefix_cache
                assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
                long = {"inputs": "你好。" * 500, "parameters": {"details": True}}  # truncation
                assert client.post(f"{server.url}/generate", json=long).json()["details"]["prompt_tokens"] == 100
                stream = client.post(f"{server.url}/generate", json={"prompt": QUESTION, "stream": True})
                texts = [json.loads(event)["text"][0] for event in stream.content.split(b"\0")[:-1]]
                assert all(late.startswith(early) for early, late in pairwise(texts))  # fullText
                assert len(texts[-1]) > len(texts[0])
            assert server.stop() == 0


class TestTls:
    def test_both_sides_show_a_certificate(self, tmp_path):
        files = make_certificates(tmp_path)
        config = service_config()
        config["ServerConfig"] |= {"httpsEnabled": True, "tlsCaPath": "./"}
        for prefix in ("tls", "managementTls", "metricsTls"):
            config["ServerConfig"] |= {f"{prefix}CaFile": ["ca.pem"], f"{prefix}CrlPath": ""}
            config["ServerConfig"] |= {f"{prefix}Cert": "server.pem", f"{prefix}Pk": "server.key"}
        (tmp_path / "conf").mkdir()
        path = tmp_path / "conf" / "config.json"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "telechat_mindie", "serve", str(nano_directory())]
        with Server([*command, "--service-config", str(path)]) as server:
            assert server.url.startswith("https://")
            context = ssl.create_default_context(cafile=str(files["ca.pem"]))
            with pytest.raises(httpx.TransportError), httpx.Client(verify=context, trust_env=False) as client:
                client.get(f"{server.url}/v1/models")  # no certificate of ours
            context.load_cert_chain(files["client.pem"], files["client.key"])
            with httpx.Client(verify=context, trust_env=False) as client:
                assert client.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "telechat"
                body = {"inputs": QUESTION, "parameters": {"max_new_tokens": 4}}
                assert client.post(f"{server.url}/generate", json=body).status_code == 200
            with pytest.raises(httpx.TransportError):
                httpx.get(server.url.replace("https", "http"), trust_env=False)
            old = ssl.create_default_context(cafile=str(files["ca.pem"]))
            old.load_cert_chain(files["client.pem"], files["client.key"])
            old.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(httpx.TransportError), httpx.Client(verify=old, trust_env=False) as client:
                client.get(f"{server.url}/v1/models")
            assert server.stop() == 0

    def test_missing_files_are_named_before_the_model_is_loaded(self, tmp_path):
        config = service_config()
        config["ServerConfig"]["httpsEnabled"] = True
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        done = run(str(nano_directory()), "--service-config", str(path), "--mindie-home", str(tmp_path))
        assert done.returncode == 2 and "server.pem" in done.stderr and done.stderr.count("\n") == 1


def make_certificates(folder) -> dict:
    """An authority, and certificates of a server on 127.0.0.1 and of a client that it signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    files = {}

    def issue(name, key, issuer, is_authority):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(addresses, critical=False)
        )
        signed = builder.sign(authority_key, hashes.SHA256())
        files[f"{name}.pem"] = folder / f"{name}.pem"
        files[f"{name}.pem"].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        files[f"{name}.key"] = folder / f"{name}.key"
        files[f"{name}.key"].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

    issue("ca", authority_key, "ca", True)
    issue("server", ec.generate_private_key(ec.SECP256R1()), "ca", False)
    issue("client", ec.generate_private_key(ec.SECP256R1()), "ca", False)
    return files
