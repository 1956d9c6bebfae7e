"""A stand-in for MindIE's daemon, after MindIE-LLM v3.0.0.beta.2 src/server/daemon/llm_daemon.cpp and executor.cpp.

It reads and checks its config, makes a process group, shared memory and one worker a rank, lets rank 0 fork a scheduler
that leaves the group, binds the ports when the model is loaded, prints what the real one prints, answers /generate and
health, and dies with its workers. Nothing but the standard library is imported, so that it starts in an instant.

What goes wrong is chosen by the environment variable STAND_IN, a comma-separated list of:

    slow=SECONDS        the model takes so long to load
    out-of-memory       rank 0 finds no room on its card and ends
    config-refused      the config is refused
    deaf                SIGTERM has no effect on any process
    worker-dies=SECONDS rank 0 is killed so long after the start
    refuses             requests are answered with HTTP 500
    silent              it ends with status 3, and says nothing

`install(folder)` makes a MindIE home of it.
"""

import http.server
import json
import os
import pathlib
import signal
import socket
import stat
import sys
import threading
import time

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
    (folder / "version.info").write_text("MindIE-LLM Version : 3.0.0.beta.2\n")
    return folder


def say(text: str) -> None:
    """One write a line, as several processes share the log."""
    os.write(1, f"{text}\n".encode())


def log(level: str, text: str) -> None:
    say(f"[2026-01-01 00:00:00.000] [{os.getpid()}] [{os.getpid()}] [server] [{level}] {text}")


def fail(*lines: str) -> None:
    """Failed to init endpoint: the whole group is killed."""
    for line in lines:
        log("ERROR", line)
    log("ERROR", "[MIE04E01011C] Failed to init endpoint! Please check the service log or console output.")
    os.killpg(os.getpgrp(), signal.SIGKILL)


def read_config() -> dict:
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    path = pathlib.Path(arguments.get("--config-file") or os.environ["MIES_CONFIG_JSON_PATH"])
    if path.is_symlink():
        fail(f"The file: {path.name} is a link.")
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & ~0o640:
        fail(f"Check path: {path.name} failed, by: Check Other group permission failed: {path}")
    say(f"ConfigManager: Load Config from {path}.")
    config = json.loads(path.read_text())
    for model in config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"]:
        weights = pathlib.Path(model["modelWeightPath"])
        if not (weights / "config.json").is_file() or stat.S_IMODE(weights.stat().st_mode) & ~0o750:
            fail("Check path: config.json failed")
        if model["backendType"] != os.environ.get("MINDIE_LLM_FRAMEWORK_BACKEND", "ATB").lower():
            fail("backendType and MINDIE_LLM_FRAMEWORK_BACKEND differ")
    if "config-refused" in FAULTS:
        say("ConfigManager init exception: [ConfigManager] Checking Config Failed")
        fail("[MIE04E02011C] Failed to init infer model instance")
    return config


def make_shared_memory() -> None:
    names = (f"{os.getpid()}_0_execute_request", f"sem.{os.getpid()}_0_execute_request_produce_0")
    for name in (*names, f"llm_tokenizer_shared_memory_{os.getpid()}_0"):
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
            say("RuntimeError: NPU out of memory. Tried to allocate 9.00 GiB.")
            os._exit(1)
    say("[INFO] loading \x1b[31mweights\x1b[0m")
    time.sleep(float(FAULTS.get("slow", 0)))
    os.write(ready, b"1")
    if rank == 0 and "worker-dies" in FAULTS:
        time.sleep(float(FAULTS["worker-dies"]))
        os.kill(os.getpid(), signal.SIGSEGV)
    while True:
        signal.pause()


def start_workers(count: int) -> tuple[list[int], int]:
    """The workers' pids, and a pipe on which each writes a byte when it has loaded its part."""
    reader, writer = os.pipe()
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            run_worker(rank, writer)
        pids.append(pid)
    os.close(writer)
    return pids, reader


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # so that the client hangs up first, and no port is left in TIME_WAIT

    def do_GET(self) -> None:
        self.reply(200 if self.path in ("/v2/health/ready", "/health") else 404, {})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "refuses" in FAULTS:
            self.reply(500, {"error": "Engine callback timeout.", "error_type": "Incomplete Generation"})
        else:
            self.reply(200, {"text": [f"{request['prompt']} 您好！"]})

    def reply(self, status: int, body: dict) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Not a line a request."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


def is_port_used(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as failure:
            log("ERROR", f"[MIE04E020407] Socket bind failed, bind_result is -1. {failure.strerror}")
            return True
    return False


def serve(config: dict) -> None:
    server = config["ServerConfig"]
    names = ("managementPort", "port", "metricsPort")
    if any(is_port_used(server[name]) for name in names):
        fail(
            "[MIE04E020407] Management or Business or Metrics Http server listen port is occupied",
            "[MIE04E02011C] Failed to start http wrapper",
        )
    addresses = {"managementPort": server["managementIpAddress"]}
    for name in names:
        listener = Server((addresses.get(name, server["ipAddress"]), server[name]), Handler)
        threading.Thread(target=listener.serve_forever, daemon=True).start()


def kill_group(workers: list[int]) -> None:
    """SIGTERM to the group, a wait, SIGKILL to what is left, abort(). The shared memory stays."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("Daemon is killing, please wait about 15 seconds...")
    os.killpg(os.getpgrp(), signal.SIGTERM)
    time.sleep(0.1)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    os.kill(os.getppid(), signal.SIGCHLD)
    os._exit(134)


def main() -> None:
    say(f"g_mainPid = {os.getpid()}")
    if "silent" in FAULTS:
        sys.exit(3)
    try:
        os.setpgid(0, 0)
    except PermissionError:
        log("ERROR", "[MIE04E01011C] Failed to set process group. errno is 1")
        sys.exit(255)
    config = read_config()
    make_shared_memory()
    count = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["worldSize"]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
    workers, reader = start_workers(count)
    for pid in workers:
        log("INFO", f"Execute command: mindie_llm_backend --local_rank {workers.index(pid)}")
    threading.Thread(target=bring_up, args=(config, reader, count), daemon=True).start()
    while True:
        number = signal.sigwait({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
        if number == signal.SIGCHLD:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0 or status == 0:
                continue
            if os.WIFSIGNALED(status):
                killer = os.WTERMSIG(status)
                name = signal.strsignal(killer)
                log("ERROR", f"[MIE04E010109] Process {pid} was terminated by signal {killer} ({name})")
            else:
                log("INFO", f"Process {pid} exited normally with status {os.WEXITSTATUS(status)}")
            workers.remove(pid)
            kill_group(workers)
        elif "deaf" not in FAULTS:
            log("WARN", f"[MIE04W01011A] Received exit signal[{number}]")
            kill_group(workers)


def bring_up(config: dict, reader: int, count: int) -> None:
    for _ in range(count):
        if not os.read(reader, 1):
            return
    serve(config)
    say("Daemon start success!")


if __name__ == "__main__":
    main()
