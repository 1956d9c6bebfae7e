"""A stand-in for MindIE's daemon, after MindIE-LLM v3.0.0.beta.2 src/server/daemon/llm_daemon.cpp and executor.cpp.

It makes a process group (and ends where it leads a session), reads and checks its config, makes shared memory and one
worker a rank, lets rank 0 fork a scheduler that leaves the group, binds the ports when the model is loaded, answers
/generate and health, over TLS 1.3 with a client's certificate where httpsEnabled says so, and dies with its workers.
Every line that it says is of mindie_conversation.json. A second of the real one lasts `SECOND` here. Nothing but the
standard library is imported, so that it starts in an instant.

What goes wrong is chosen by the environment variable STAND_IN, a comma-separated list of:

    slow=SECONDS        the model takes so long to load
    out-of-memory       rank 0 finds no room on its card and ends
    config-refused      the config is refused, as late as the real one does
    deaf                SIGTERM has no effect on any process
    worker-dies=SECONDS rank 0 is killed so long after the start
    request-kills       the first request kills rank 0, and is never answered
    refuses             requests are answered with HTTP 500
    mute=SECONDS        requests are answered so late
    proxied             a proxy answers in its place
    silent              it ends with status 3, and says nothing

`install(folder)` makes a MindIE home of it.
"""

import http.server
import json
import os
import pathlib
import resource
import signal
import socket
import stat
import sys
import threading
import time

SECOND = 0.05

CONVERSATION = pathlib.Path(__file__).with_name("mindie_conversation.json")
LINES = {
    line["id"]: line
    for name, lines in json.loads(CONVERSATION.read_text(encoding="utf-8")).items()
    if name != "about"
    for line in lines
    if "id" in line
}

SHM = pathlib.Path("/dev/shm")
FAULTS = {entry.partition("=")[0]: entry.partition("=")[2] for entry in os.environ.get("STAND_IN", "").split(",")}


def install(folder: pathlib.Path, ms_wrapper: bool = True) -> pathlib.Path:
    """A MindIE home in `folder`: bin/ with the daemon and the workers' script, and a mindie_llm to be found."""
    package = folder / "mindie_llm" / "modeling" / "model_wrapper"
    for path in (folder / "bin", folder / "conf", package / "ms" if ms_wrapper else package):
        path.mkdir(parents=True)
    (folder / "mindie_llm" / "__init__.py").touch()
    for name in ("mindieservice_daemon", "mindie_llm_backend"):
        script = folder / "bin" / name
        script.write_text(f"#!{sys.executable}\n" + pathlib.Path(__file__).read_text())
        script.chmod(0o550)
    (folder / "bin" / CONVERSATION.name).write_bytes(CONVERSATION.read_bytes())
    (folder / "version.info").write_text("MindIE-LLM Version : 3.0.0.beta.2\n")
    return folder


def say(id: str, **values: object) -> None:
    """One write a line, as several processes share the log."""
    line = LINES[id]
    text = line["text"].format(**values)
    if "level" in line:
        code = f"[{line['code']}] " if "code" in line else ""
        module = f"[{line['module']}] " if "module" in line else ""
        place = pathlib.PurePath(line["source"].split(";")[0]).name
        head = f"[2026-01-01 00:00:00.000000] [{os.getpid()}] [{os.getpid()}] [{line.get('logger', 'server')}]"
        text = f"{head} [{line['level']}] [{place}] {code}{module}{text}"
    os.write(1, f"{text}\n".encode())


def fail(*ids: str, **values: object) -> None:
    """The endpoint did not come up: the whole group is killed (llm_daemon.cpp:324-330)."""
    for id in ids:
        say(id, **values)
    say("no-endpoint")
    os.killpg(os.getpgrp(), signal.SIGKILL)


def read_config() -> dict:
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    path = pathlib.Path(arguments.get("--config-file") or os.environ["MIES_CONFIG_JSON_PATH"])
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & ~0o640:
        mode = f"{stat.S_IMODE(status.st_mode):o}"
        fail("mode", "no-engine", name=path.name, path=path, mode=mode)
    say("config", path=path)
    config = json.loads(path.read_text())
    say("config-read")
    if "config-refused" in FAULTS:
        time.sleep(10 * SECOND)
        fail("refused", "no-engine")
    for model in config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"]:
        if model["backendType"] != os.environ.get("MINDIE_LLM_FRAMEWORK_BACKEND", "ATB").lower():
            fail("framework", "no-engine")
    return config


def make_shared_memory() -> None:
    """What a kill leaves behind; that of the tokenizers has no name any more once it is open
    (infer_tokenizer.cpp:320-326)."""
    for name in (f"{os.getpid()}_0_execute_request", f"sem.{os.getpid()}_0_execute_request_produce_0"):
        (SHM / name).write_bytes(bytes(4096))


def run_worker(rank: int, ready: int) -> None:
    """Rank 0 forks the ranks' scheduler, as mindformers' ModelRunner does; here it also leaves the group, and an own
    group and a lost parent are what makes it an orphan after a crash."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    term = signal.SIG_IGN if "deaf" in FAULTS else signal.SIG_DFL
    for number, handler in ((signal.SIGTERM, term), (signal.SIGINT, term), (signal.SIGCHLD, signal.SIG_DFL)):
        signal.signal(number, handler)
    if rank == 0:
        if os.fork() == 0:
            os.setsid()
            scheduler = socket.socket()
            scheduler.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            scheduler.bind((os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"])))
            scheduler.listen()
            while True:
                signal.pause()
        if "out-of-memory" in FAULTS:
            say("no-memory")
            os._exit(1)
    say("loading")
    time.sleep(float(FAULTS.get("slow", 0)))
    os.write(ready, b"1")
    if rank == 0 and "worker-dies" in FAULTS:
        time.sleep(float(FAULTS["worker-dies"]))
        os.kill(os.getpid(), signal.SIGSEGV)
    while True:
        signal.pause()


def start_workers(devices: list[int]) -> tuple[list[int], int]:
    """The workers' pids, and a pipe on which each writes a byte when it has loaded its part."""
    reader, writer = os.pipe()
    daemon, count = os.getpid(), len(devices)
    pids = []
    for rank, device in enumerate(devices):
        say("worker", rank=rank, count=count, device=device, pid=daemon)
        pid = os.fork()
        if pid == 0:
            run_worker(rank, writer)
        pids.append(pid)
    os.close(writer)
    return pids, reader


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # so that the client hangs up first, and no port is left in TIME_WAIT
    workers: list[int]

    def do_GET(self) -> None:
        self.reply(200 if self.path in ("/v2/health/ready", "/health") else 404, {})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(float(FAULTS.get("mute", 0)))
        if "request-kills" in FAULTS:
            os.kill(self.workers[0], signal.SIGSEGV)
            signal.pause()
        elif "refuses" in FAULTS:
            self.reply(500, {"error": "Engine callback timeout.", "error_type": "Incomplete Generation"})
        elif "proxied" in FAULTS:
            self.reply(503, "<html>no such host</html>", Via="1.1 squid")
        else:
            self.reply(200, {"text": [f"{request['prompt']} 您好！"]})

    def reply(self, status: int, body: object, **headers: str) -> None:
        payload = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Not a line a request."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A handshake that fails is not told to anybody but the client."""


def is_port_used(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            say("bind")
            return True
    return False


def tls_of(server: dict, plane: str):
    """A plane's side of TLS: 1.3 alone, and a client must show a certificate that the CA has signed, for clients, and
    that no revocation list names (http_ssl.cpp:171-290, 373-430)."""
    import ssl

    def field(name: str):
        return server[plane + name if plane else name[0].lower() + name[1:]]

    home = pathlib.Path(__file__).resolve().parent.parent
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(home / field("TlsCert"), home / field("TlsPk"))
    for name in field("TlsCaFile"):
        context.load_verify_locations(home / (server["tlsCaPath"] + name))
    for name in field("TlsCrlFiles"):
        context.load_verify_locations(home / (field("TlsCrlPath") + name))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    return context


def serve(config: dict, workers: list[int]) -> None:
    server = config["ServerConfig"]
    planes = {"managementPort": "management", "port": "", "metricsPort": "metrics"}
    if any(is_port_used(server[name]) for name in planes):
        fail("occupied", "no-http")
    Handler.workers = workers
    for name, plane in planes.items():
        address = server["ipAddress" if name == "port" else "managementIpAddress"]
        listener = Server((address, server[name]), Handler)
        if server["httpsEnabled"]:
            try:
                context = tls_of(server, plane)
            except OSError:
                fail("no-tls", "no-http")
            listener.socket = context.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=listener.serve_forever, daemon=True).start()


def kill_group(workers: list[int]) -> None:
    """SIGTERM to the group, up to ten seconds' wait, SIGKILL to what is left, abort(). Shared memory stays
    (llm_daemon.cpp:120-192)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("killing")
    os.killpg(os.getpgrp(), signal.SIGTERM)
    os.kill(os.getppid(), signal.SIGCHLD)
    for elapsed in range(11):
        for pid in list(workers):
            if os.waitpid(pid, os.WNOHANG)[0]:
                workers.remove(pid)
        if not workers or elapsed == 10:
            break
        time.sleep(SECOND)
        say("waiting", elapsed=elapsed + 1)
    if not workers:
        say("gone")
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()


def take_child(workers: list[int]) -> bool:
    """Say what became of a worker, and whether that ends everything."""
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid == 0:
        return False
    workers.remove(pid)
    say("child", pid=os.getpid())
    say("exited", child=pid)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        say("terminated", child=pid, number=number, name=signal.strsignal(number))
    else:
        say("exited-normally", child=pid, status=os.WEXITSTATUS(status))
    return status != 0


def main() -> None:
    if "silent" in FAULTS:
        sys.exit(3)
    say("pid", pid=os.getpid())
    say("format")
    try:
        os.setpgid(0, 0)
    except PermissionError:
        say("no-group")
        sys.exit(255)
    config = read_config()
    make_shared_memory()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
    workers, reader = start_workers(config["BackendConfig"]["npuDeviceIds"][0])
    up = threading.Event()
    threading.Thread(target=bring_up, args=(config, reader, workers, up), daemon=True).start()
    while True:
        number = signal.sigwait({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
        if number == signal.SIGCHLD:
            if take_child(workers):
                say("handled-child")
                kill_group(workers)
        elif "deaf" not in FAULTS:
            say("signal", number=int(number))
            say("handled")
            if not up.is_set():
                time.sleep(5 * SECOND)  # only a thread that waits behind the success line ends it at once (:217, 336)
            kill_group(workers)


def bring_up(config: dict, reader: int, workers: list[int], up: threading.Event) -> None:
    for _ in list(workers):
        if not os.read(reader, 1):
            return
    say("cache", length=config["BackendConfig"]["ModelDeployConfig"]["maxSeqLen"])
    for id in ("executor", "engine", "dynamic-config"):
        say(id)
    say("tokenizers", count=config["BackendConfig"]["tokenizerProcessNumber"])
    say("health")
    serve(config, workers)
    for id in ("endpoint", "success", "success-logged"):
        say(id)
    up.set()


if __name__ == "__main__":
    main()
