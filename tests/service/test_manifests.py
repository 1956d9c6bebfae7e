"""`manifests`: files that docker compose and Kubernetes take, and a start script that does what it says."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from helpers import ROOT, stand_in_daemon
from helpers.checkpoints import make_checkpoint
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from test_service_config import FACTS_7B, FACTS_115B

from telechat_mindie import __version__
from telechat_mindie.errors import InputError, OutputError
from telechat_mindie.mindie import GENERATIONS
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.service import manifests, own_wheel, ports, schema
from telechat_mindie.service.manifests import ENVIRONMENT, ManifestOptions, dns_label, write_manifests
from telechat_mindie.service.options import ServiceOptions

WHEEL = "telechat_mindie-1-py3-none-any.whl"


def render_manifests(facts, options):
    return manifests.render_manifests(facts, options, None if options.index_url else WHEEL)


HTTP = ServiceOptions(insecure_http=True)
K8S = ManifestOptions("k8s", service=HTTP)
DOCKER = ManifestOptions("docker", service=HTTP)


class Strict(BaseModel):
    """A part of the Kubernetes API (v1, apps/v1, policy/v1): the fields used here, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


Label = Annotated[StrictStr, Field(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
Port = Annotated[StrictInt, Field(ge=1, le=65535)]
PortName = Annotated[StrictStr, Field(pattern=r"^[a-z0-9-]{1,15}$")]
Quantity = Annotated[StrictStr, Field(pattern=r"^\d+(Mi|Gi)$")]
Labels = dict[StrictStr, Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9._-]{1,63}$")]]


class Meta(Strict):
    name: Label
    namespace: Label
    labels: Labels


class Selector(Strict):
    matchLabels: Labels


class HttpGet(Strict):
    path: Annotated[StrictStr, Field(pattern=r"^/v2/health/(live|ready)$")]
    port: PortName


class TcpSocket(Strict):
    port: PortName


class Probe(Strict):
    httpGet: HttpGet | None = None
    tcpSocket: TcpSocket | None = None
    periodSeconds: Annotated[StrictInt, Field(ge=1)]
    timeoutSeconds: Annotated[StrictInt, Field(ge=1)]
    failureThreshold: Annotated[StrictInt, Field(ge=1)]


class FieldRef(Strict):
    fieldPath: Literal["status.podIP"]


class ValueFrom(Strict):
    fieldRef: FieldRef


class Env(Strict):
    name: Annotated[StrictStr, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
    value: StrictStr | None = None
    valueFrom: ValueFrom | None = None


class ContainerPort(Strict):
    name: PortName
    containerPort: Port


class Resources(Strict):
    requests: dict[StrictStr, StrictInt]
    limits: dict[StrictStr, StrictInt]


class Mount(Strict):
    name: Label
    mountPath: Annotated[StrictStr, Field(pattern=r"^/")]
    readOnly: StrictBool = False


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: Literal[False]


class Container(Strict):
    name: Label
    image: StrictStr
    command: list[StrictStr]
    securityContext: ContainerSecurity
    env: list[Env]
    ports: list[ContainerPort]
    resources: Resources
    startupProbe: Probe
    readinessProbe: Probe
    livenessProbe: Probe
    volumeMounts: list[Mount]


class HostPath(Strict):
    path: StrictStr
    type: Literal["Directory"]


class Claim(Strict):
    claimName: StrictStr
    readOnly: Literal[True]


class Named(Strict):
    name: Label


class EmptyDir(Strict):
    medium: Literal["Memory"]
    sizeLimit: Quantity


class SecretItem(Strict):
    key: Annotated[StrictStr, Field(pattern=r"^[-._a-zA-Z0-9]+$")]
    path: Annotated[StrictStr, Field(pattern=r"^[^/]")]


class Secret(Strict):
    secretName: StrictStr
    defaultMode: Literal[0o400]
    items: list[SecretItem]


class Volume(Strict):
    name: Label
    hostPath: HostPath | None = None
    persistentVolumeClaim: Claim | None = None
    configMap: Named | None = None
    emptyDir: EmptyDir | None = None
    secret: Secret | None = None


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurity(Strict):
    seccompProfile: Seccomp


class Spread(Strict):
    maxSkew: Literal[1]
    topologyKey: StrictStr
    whenUnsatisfiable: Literal["ScheduleAnyway"]
    labelSelector: Selector


class PodSpec(Strict):
    automountServiceAccountToken: Literal[False]
    terminationGracePeriodSeconds: StrictInt
    topologySpreadConstraints: list[Spread]
    securityContext: PodSecurity
    containers: list[Container]
    volumes: list[Volume]


class PodMeta(Strict):
    labels: Labels
    annotations: dict[StrictStr, StrictStr]


class PodTemplate(Strict):
    metadata: PodMeta
    spec: PodSpec


class Rolling(Strict):
    maxSurge: StrictInt
    maxUnavailable: StrictInt


class Strategy(Strict):
    type: Literal["RollingUpdate"]
    rollingUpdate: Rolling


class DeploymentSpec(Strict):
    replicas: StrictInt
    selector: Selector
    strategy: Strategy
    template: PodTemplate


class Deployment(Strict):
    apiVersion: Literal["apps/v1"]
    kind: Literal["Deployment"]
    metadata: Meta
    spec: DeploymentSpec


class ConfigMap(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Meta
    data: dict[StrictStr, StrictStr]


class ServicePort(Strict):
    name: PortName
    port: Port
    targetPort: PortName


class ServiceSpec(Strict):
    type: Literal["ClusterIP"]
    selector: Labels
    ports: list[ServicePort]


class Service(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["Service"]
    metadata: Meta
    spec: ServiceSpec


class BudgetSpec(Strict):
    maxUnavailable: StrictInt
    selector: Selector


class Budget(Strict):
    apiVersion: Literal["policy/v1"]
    kind: Literal["PodDisruptionBudget"]
    metadata: Meta
    spec: BudgetSpec


class Health(Strict):
    test: list[StrictStr]
    interval: StrictStr
    timeout: StrictStr
    retries: StrictInt
    start_period: StrictStr


class ComposeService(Strict):
    """A part of the compose specification: the fields used here, and no others."""

    image: StrictStr
    command: list[StrictStr]
    init: StrictBool
    restart: Literal["unless-stopped"]
    stop_grace_period: StrictStr
    shm_size: Annotated[StrictStr, Field(pattern=r"^\d+gb$")]
    devices: list[Annotated[StrictStr, Field(pattern=r"^/dev/\w+:/dev/\w+:rwm$")]]
    volumes: list[Annotated[StrictStr, Field(pattern=r"^(/|\./)[^:]*:/[^:]*:ro$")]]
    environment: dict[StrictStr, StrictStr]
    ports: list[Annotated[StrictStr, Field(pattern=r"^127\.0\.0\.1:\d+:\d+$")]]
    healthcheck: Health


class Compose(Strict):
    name: Label
    services: dict[StrictStr, ComposeService]


def kubernetes(files: dict[str, str]) -> tuple[ConfigMap, Deployment, Service, Budget]:
    """The objects of the rendered files, each valid, together consistent."""
    load = {name: yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")}
    resources = load["kustomization.yaml"]["resources"]
    assert sorted(resources) == sorted(load.keys() - {"kustomization.yaml"})
    config = ConfigMap.model_validate(load["configmap.yaml"])
    deployment = Deployment.model_validate(load["deployment.yaml"])
    service = Service.model_validate(load["service.yaml"])
    budget = Budget.model_validate(load["poddisruptionbudget.yaml"])
    template = deployment.spec.template
    for selector in (deployment.spec.selector.matchLabels, service.spec.selector, budget.spec.selector.matchLabels):
        assert selector.items() <= template.metadata.labels.items()
    container = template.spec.containers[0]
    assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in template.spec.volumes}
    for volume in template.spec.volumes:
        assert len(volume.model_dump(exclude_none=True)) == 2
    names = {port.name for port in container.ports}
    assert {port.targetPort for port in service.spec.ports} <= names
    for probe in (container.startupProbe, container.readinessProbe, container.livenessProbe):
        handlers = [handler for handler in (probe.httpGet, probe.tcpSocket) if handler]
        assert len(handlers) == 1 and handlers[0].port in names
    return config, deployment, service, budget


class TestKubernetes:
    def test_it_fits_the_model_and_its_config(self):
        files = render_manifests(FACTS_115B, replace(K8S, replicas=3))
        config, deployment, service, _ = kubernetes(files)
        served = json.loads(config.data["config.json"])
        assert schema.validate(served, "3.0.0.beta") == []
        backend, server = served["BackendConfig"], served["ServerConfig"]
        container = deployment.spec.template.spec.containers[0]
        assert deployment.spec.replicas == 3
        assert container.resources.requests == container.resources.limits == {"huawei.com/Ascend910": 8}
        assert backend["npuDeviceIds"] == [[0, 1, 2, 3, 4, 5, 6, 7]] and backend["modelInstanceNumber"] == 1
        path = backend["ModelDeployConfig"]["ModelConfig"][0]["modelWeightPath"]
        mounts = {mount.name: mount for mount in container.volumeMounts}
        assert (mounts["model"].mountPath, mounts["model"].readOnly) == (path, True)
        volumes = {volume.name: volume for volume in deployment.spec.template.spec.volumes}
        assert volumes["model"].hostPath.path == FACTS_115B.model_path
        ports = {port.name: port.containerPort for port in container.ports}
        assert ports == {
            "http": server["port"],
            "management": server["managementPort"],
            "metrics": server["metricsPort"],
        }
        assert [port.port for port in service.spec.ports] == [server["port"], server["metricsPort"]]
        assert container.readinessProbe.httpGet == HttpGet(path="/v2/health/ready", port="management")
        assert container.livenessProbe.httpGet == HttpGet(path="/v2/health/live", port="management")
        assert config.data["start.sh"] == files["start.sh"]

    def test_ports_are_mindies_own_even_where_taken_here(self):
        served = json.loads(yaml.safe_load(render_manifests(FACTS_7B, K8S)["configmap.yaml"])["data"]["config.json"])
        assert served["ServerConfig"]["port"] == 1025

    def test_https_needs_a_secret_and_mounts_what_the_config_names(self):
        secure = replace(K8S, service=ServiceOptions())
        with pytest.raises(InputError, match="--tls-secret"):
            render_manifests(FACTS_7B, secure)
        config, deployment, _, _ = kubernetes(render_manifests(FACTS_7B, replace(secure, tls_secret="mindie-tls")))
        server = json.loads(config.data["config.json"])["ServerConfig"]
        secret = next(volume.secret for volume in deployment.spec.template.spec.volumes if volume.secret)
        paths = {item.path for item in secret.items}
        assert {server["tlsCert"], server["tlsPk"], server["tlsCaPath"] + server["tlsCaFile"][0]} <= paths
        assert len({item.key for item in secret.items}) == len(paths)
        container = deployment.spec.template.spec.containers[0]
        assert container.readinessProbe.tcpSocket == TcpSocket(port="management")

    def test_a_claim_in_place_of_the_nodes_folder(self):
        _, deployment, _, _ = kubernetes(render_manifests(FACTS_7B, replace(K8S, claim="models")))
        volume = next(volume for volume in deployment.spec.template.spec.volumes if volume.name == "model")
        assert volume.persistentVolumeClaim.claimName == "models" and volume.hostPath is None

    def test_another_config_makes_other_pods(self):
        def hash_of(**service: Any) -> str:
            options = replace(K8S, service=ServiceOptions(insecure_http=True, **service))
            _, deployment, _, _ = kubernetes(render_manifests(FACTS_7B, options))
            return deployment.spec.template.metadata.annotations["telechat-mindie/config"]

        assert hash_of() == hash_of() != hash_of(max_seq_len=4096)

    @pytest.mark.parametrize("generation", [name for name, row in GENERATIONS.items() if row.ms_backend])
    def test_generations(self, generation):
        options = replace(K8S, service=ServiceOptions(insecure_http=True, generation=generation))
        config, _, _, _ = kubernetes(render_manifests(FACTS_7B, options))
        assert schema.validate(json.loads(config.data["config.json"]), generation) == []


class TestCompose:
    def test_containers_share_no_card_and_no_port(self):
        files = render_manifests(FACTS_7B, replace(DOCKER, replicas=2, service=replace(HTTP, devices="3,6")))
        compose = Compose.model_validate(yaml.safe_load(files["compose.yaml"]))
        cards = [
            [device for device in service.devices if re.match(r"/dev/davinci\d", device)]
            for service in compose.services.values()
        ]
        assert cards == [["/dev/davinci3:/dev/davinci3:rwm"], ["/dev/davinci6:/dev/davinci6:rwm"]]
        ports = [port for service in compose.services.values() for port in service.ports]
        assert len({port.split(":")[1] for port in ports}) == len(ports) == 4
        backend = json.loads(files["config.json"])["BackendConfig"]
        assert backend["npuDeviceIds"] == [[0]]  # inside, cards are numbered from 0
        path = backend["ModelDeployConfig"]["ModelConfig"][0]["modelWeightPath"]
        for service in compose.services.values():
            assert f"{FACTS_7B.model_path}:{path}:ro" in service.volumes
            assert service.environment == ENVIRONMENT
            assert "/v2/health/ready" in service.healthcheck.test[-1]

    def test_https(self):
        files = render_manifests(FACTS_7B, replace(DOCKER, service=ServiceOptions()))
        compose = Compose.model_validate(yaml.safe_load(files["compose.yaml"]))
        service = compose.services["server-0"]
        assert "./tls:/etc/mindie-tls:ro" in service.volumes and "create_connection" in service.healthcheck.test[-1]

    def test_health_checks_are_python(self):
        for service in (HTTP, ServiceOptions()):
            files = render_manifests(FACTS_7B, replace(DOCKER, service=service))
            compose = Compose.model_validate(yaml.safe_load(files["compose.yaml"]))
            compile(compose.services["server-0"].healthcheck.test[-1], "healthcheck", "exec")


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (K8S, {"kind": "helm"}, "docker or k8s"),
        (K8S, {"image": "a b"}, "--image"),
        (K8S, {"image": "a\nkind: Secret"}, "--image"),
        (K8S, {"namespace": "A"}, "--namespace"),
        (K8S, {"claim": "a b"}, "--claim"),
        (K8S, {"tls_secret": "a/b"}, "--tls-secret"),
        (K8S, {"resource": "npu"}, "--resource"),
        (K8S, {"mindie_home": "/a b"}, "--mindie-home"),
        (K8S, {"replicas": 0}, "--replicas"),
        (K8S, {"shm_gb": 0}, "--shm-gb"),
        (K8S, {"startup_minutes": 0}, "--startup-minutes"),
        (K8S, {"index_url": "mirror"}, "--index-url"),
        (K8S, {"index_url": "https://x", "wheel": Path("y")}, "--wheel and --index-url"),
        (K8S, {"service": replace(HTTP, devices="0")}, "--devices"),
        (DOCKER, {"service": replace(HTTP, devices="0-2")}, "--devices 0-2"),
        (DOCKER, {"claim": "a"}, "--kind k8s"),
    ],
)
def test_refusals(base, changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        render_manifests(FACTS_7B, replace(base, **changes))


def test_a_path_that_compose_would_cut():
    with pytest.raises(InputError, match="cannot be mounted"):
        render_manifests(replace(FACTS_7B, model_path="/models/a:b"), DOCKER)


@pytest.mark.parametrize(
    ("name", "label"),
    [("TeleChat2-7B", "telechat2-7b"), ("7B", "telechat-7b"), ("a" * 80, "a" * 50), ("A_b.C", "a-b-c")],
)
def test_names(name, label):
    assert dns_label(name) == label


class TestStartScript:
    """Run as a container would, its folders moved into a temporary one."""

    @pytest.fixture
    def run(self, tmp_path):
        files = render_manifests(FACTS_7B, DOCKER)
        script = files["start.sh"]
        for folder in ("/etc/mindie", "/run/mindie", "/usr/local/Ascend"):
            script = script.replace(folder, f"{tmp_path}{folder}")
        (tmp_path / "start.sh").write_text(script)
        (tmp_path / "etc/mindie").mkdir(parents=True)
        (tmp_path / "etc/mindie/real").write_text(files["config.json"])
        (tmp_path / "etc/mindie/config.json").symlink_to("real")  # as a mounted ConfigMap is
        home = tmp_path / "usr/local/Ascend/mindie/latest/mindie-service"
        (home / "bin").mkdir(parents=True)
        (tmp_path / "usr/local/Ascend/mindie/set_env.sh").write_text("export FROM_SET_ENV=yes\n")

        def start(**environment: str) -> subprocess.CompletedProcess[str]:
            paths = f"{Path(sys.executable).parent}:/usr/bin:/bin"
            variables = {"PATH": paths, "POD_IP": "10.0.0.7", **environment}
            command = ["bash", str(tmp_path / "start.sh")]
            return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, cwd=tmp_path)

        start.home, start.root = home, tmp_path
        return start

    def daemon(self, run) -> None:
        path = run.home / "bin" / "mindieservice_daemon"
        path.write_text('#!/bin/bash\npwd; stat -c "%a %F" "$MIES_CONFIG_JSON_PATH"; env\n')
        path.chmod(0o755)

    def test_the_daemon_finds_what_it_asks_for(self, run):
        self.daemon(run)
        done = run()
        lines = done.stdout.splitlines()
        assert done.returncode == 0, done.stderr
        assert lines[:2] == [str(run.home), "640 regular file"]
        assert {"MIES_CONTAINER_IP=10.0.0.7", "MIES_CONTAINER_MANAGEMENT_IP=10.0.0.7", "FROM_SET_ENV=yes"} <= set(lines)
        assert json.loads((run.root / "run/mindie/config.json").read_text())["Version"] == "1.0.0"

    def test_of_two_exported_folders_the_services_is_the_home(self, run):
        """As with both set_env.sh of 2.x sourced; launch and doctor choose alike (`mindie.HOME_VARIABLES`)."""
        self.daemon(run)
        llm, service = run.root / "mindie-llm", run.root / "mindie-service"
        for folder in (llm, service):
            folder.mkdir()
        shutil.copytree(run.home / "bin", service / "bin")
        both = {"MINDIE_LLM_HOME_PATH": str(llm), "MIES_INSTALL_PATH": str(service)}
        for environment, home in (
            (both, service),
            ({"MINDIE_LLM_HOME_PATH": str(service)}, service),
            ({"MIES_INSTALL_PATH": str(service), "MINDIE_LLM_HOME_PATH": ""}, service),
            ({"MIES_INSTALL_PATH": "", "MINDIE_LLM_HOME_PATH": ""}, run.home),
        ):
            done = run(**environment)
            assert done.stdout.splitlines()[:1] == [str(home)], done.stderr

    def test_mindformers_is_shadowed_only_where_it_is_missing(self, run):
        self.daemon(run)
        shadow = next(line for line in run().stdout.splitlines() if line.startswith("PYTHONPATH="))
        assert shadow.endswith("/telechat_mindie/backend/shadow")
        (run.root / "lib/mindformers").mkdir(parents=True)
        (run.root / "lib/mindformers/__init__.py").touch()
        assert f"PYTHONPATH={run.root}/lib" in run(PYTHONPATH=f"{run.root}/lib").stdout.splitlines()

    def test_certificates_are_copied_into_the_home(self, run):
        self.daemon(run)
        (run.root / "etc/mindie-tls/security/certs").mkdir(parents=True)
        (run.root / "etc/mindie-tls/security/certs/server.pem").write_text("certificate")
        assert run().returncode == 0
        copied = run.home / "security/certs/server.pem"
        assert copied.read_text() == "certificate" and not stat.S_IMODE(copied.stat().st_mode) & 0o027

    def test_the_drivers_libraries_are_found_first(self, run):
        self.daemon(run)
        (path,) = [line for line in run(LD_LIBRARY_PATH="/cann").stdout.splitlines() if line.startswith("LD_LIBRARY")]
        driver = f"{run.root}/usr/local/Ascend/driver/lib64"
        assert path == f"LD_LIBRARY_PATH={driver}:{driver}/common:{driver}/driver:/cann"

    def test_a_script_of_the_image_that_fails_does_not_end_it_in_silence(self, run):
        self.daemon(run)
        (run.root / "usr/local/Ascend/mindie/set_env.sh").write_text("false\nreturn 3\n")
        done = run()
        assert done.returncode == 0 and "mindie/set_env.sh: failed" in done.stderr

    def test_the_daemons_status_is_its_own(self, run):
        path = run.home / "bin" / "mindieservice_daemon"
        path.write_text("#!/bin/bash\nexit 41\n")
        path.chmod(0o755)
        assert run().returncode == 41

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("faults", ["", "slow=60"])
    def test_as_the_first_process_of_a_container_it_starts_the_daemon_and_passes_signals_on(self, run, number, faults):
        """A session's leader, as bash is there: the stand-in calls setpgrp() as MindIE does, and would give up."""
        shutil.rmtree(run.home)
        stand_in_daemon.install(run.home)
        config = json.loads((run.root / "etc/mindie/real").read_text())
        base = ports.free_run(6000, 5)
        config["ServerConfig"] |= {"port": base, "managementPort": base + 1, "metricsPort": base + 2}
        (run.root / "etc/mindie/real").write_text(json.dumps(config))
        environment = {**ENVIRONMENT, "MS_SCHED_PORT": str(base + 3), "STAND_IN": faults, "POD_IP": "127.0.0.1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        log = run.root / "log"
        with log.open("wb") as file:
            container = subprocess.Popen(
                ["bash", str(run.root / "start.sh")], env=environment, stdout=file, stderr=file, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 30
            while ("loading" if faults else "Daemon start success!") not in log.read_text():
                assert container.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            begin = time.monotonic()
            container.send_signal(number)
            assert container.wait(timeout=20) == 128 + signal.SIGABRT  # MindIE's own end: it aborts
            assert time.monotonic() - begin < 60 * stand_in_daemon.SECOND + 2  # the grace period, in its seconds
            assert "All subprocesses exited gracefully." in log.read_text()
        finally:
            end_marked(f"STAND_IN={faults}", str(run.root))

    def test_a_signal_before_the_daemon_runs_ends_it_too(self, run):
        (run.root / "usr/local/Ascend/mindie/set_env.sh").write_text("echo sourcing; sleep 1\n")
        container = subprocess.Popen(
            ["bash", str(run.root / "start.sh")], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert container.stdout.readline() == "sourcing\n"
        container.terminate()
        container.communicate(timeout=20)
        assert container.returncode == 143

    def test_an_image_without_this_package(self, run):
        (run.root / "bin").mkdir()
        (run.root / "bin/python3").write_text("#!/bin/sh\nexit 1\n")
        (run.root / "bin/python3").chmod(0o755)
        done = run(PATH=f"{run.root}/bin:/usr/bin:/bin")
        assert done.returncode == 127 and "telechat-mindie is not installed" in done.stderr

    def test_an_image_without_a_daemon(self, run):
        done = run()
        assert done.returncode == 127 and "no mindieservice_daemon" in done.stderr


def end_marked(variable: str, folder: str) -> None:
    """What a container's end would end: the scheduler that left the daemon's group, and its shared memory."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_bytes()
            if variable.encode() in environment.split(b"\0") and folder.encode() in environment:
                os.kill(int(process.name), signal.SIGKILL)
    for path in stand_in_daemon.SHM.glob("*_0_execute_request*"):
        owner = re.search(r"\d+", path.name)
        if owner and not Path("/proc", owner[0]).exists():
            path.unlink()


class TestImage:
    """What the Dockerfile installs: a wheel beside it, or from an index by flag; never a bare name from a registry."""

    def test_the_wheel_of_this_code_lies_beside_the_dockerfile(self, tmp_path):
        write_manifests(tmp_path / "deploy", FACTS_7B, K8S)
        (wheel,) = (tmp_path / "deploy").glob("*.whl")
        text = (tmp_path / "deploy/Dockerfile").read_text()
        assert f'COPY ["{wheel.name}", "/tmp/"]' in text and f'"/tmp/{wheel.name}"]' in text and "==" not in text
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--quiet"]
        subprocess.run([*command, "--target", str(tmp_path / "site"), str(wheel)], check=True, timeout=100)
        code = "import sys, telechat_mindie.cli as cli; print(cli.__file__); sys.argv = ['x', '--version']; cli.app()"
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
             "sys.meta_path = [each for each in sys.meta_path if 'Editable' not in repr(each)]; " + code],
            capture_output=True, text=True, timeout=60, cwd=tmp_path,
        )  # fmt: skip
        assert done.stdout.splitlines() == [
            str(tmp_path / "site/telechat_mindie/cli.py"),
            f"telechat-mindie {__version__}",
        ], done.stderr
        assert (tmp_path / "site/bin/telechat-mindie").is_file()

    def test_it_holds_what_a_build_would_pack_and_is_the_same_each_time(self):
        name, data = own_wheel.pack_wheel()
        assert data == own_wheel.pack_wheel()[1]
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            packed = set(archive.namelist())
            record = archive.read(f"telechat_mindie-{__version__}.dist-info/RECORD").decode()
        assert {line.split(",")[0] for line in record.splitlines()} == packed
        sources = [path for path in (ROOT / "telechat_mindie").rglob("*") if path.is_file()]
        wanted = {str(path.relative_to(ROOT)) for path in sources if "__pycache__" not in path.parts}
        wanted |= {f"telechat_mindie/{path.relative_to(ROOT)}" for path in (ROOT / "model_dir_template").glob("*.*")}
        assert wanted == {path for path in packed if ".dist-info/" not in path}
        assert name == f"telechat_mindie-{__version__}-py3-none-any.whl"

    def test_a_wheel_that_is_named(self, tmp_path):
        name, data = own_wheel.pack_wheel()
        (tmp_path / name).write_bytes(data)
        write_manifests(tmp_path / "deploy", FACTS_7B, replace(DOCKER, wheel=tmp_path / name))
        assert (tmp_path / "deploy" / name).read_bytes() == data
        for file, content in (("other-1-py3-none-any.whl", data[:-9]), ("x.whl", b""), ("x.zip", data)):
            (tmp_path / file).write_bytes(content)
            with pytest.raises(InputError, match=r"--wheel .*(cannot be read|is no wheel of telechat-mindie)"):
                own_wheel.read_wheel(tmp_path / file)

    def test_an_index_that_is_named(self, tmp_path):
        names = write_manifests(
            tmp_path / "deploy", FACTS_7B, replace(DOCKER, index_url="https://mirror.example/simple")
        )
        text = (tmp_path / "deploy/Dockerfile").read_text()
        assert not [name for name in names if name.endswith(".whl")] and "COPY" not in text
        assert f'"--index-url", "https://mirror.example/simple", "telechat-mindie=={__version__}"]' in text

    @pytest.mark.parametrize("version", [None, "0.0.1"])
    def test_metadata_of_another_version_or_none(self, monkeypatch, version):
        found = [] if version is None else [type("Other", (), {"version": version, "files": []})()]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda name: found)
        with pytest.raises(InputError, match=r"cannot be packed.*--wheel.*--index-url"):
            own_wheel.pack_wheel()


def test_writing_is_all_or_nothing(tmp_path):
    k8s, docker = (replace(options, index_url="https://mirror.example") for options in (K8S, DOCKER))
    target = tmp_path / "deploy"
    names = write_manifests(target, FACTS_7B, k8s)
    assert sorted(entry.name for entry in target.iterdir()) == names
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in target.iterdir()} == {0o640}
    with pytest.raises(OutputError, match="not empty"):
        write_manifests(target, FACTS_7B, docker)
    assert write_manifests(target, FACTS_7B, docker, force=True) == sorted(entry.name for entry in target.iterdir())
    with pytest.raises(InputError):
        write_manifests(tmp_path / "other", FACTS_7B, replace(K8S, image=""))
    assert [entry.name for entry in tmp_path.iterdir()] == ["deploy"]


def test_the_command(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float16")
    build(tmp_path / "telechat2", tmp_path / "ckpt", BuildOptions(block_size=16))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "telechat_mindie", "manifests", str(tmp_path / "telechat2"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=dict(os.environ))

    done = run("--kind", "k8s", "-o", "deploy", "--insecure-http", "--replicas", "2", "--namespace", "llm")
    assert done.returncode == 0 and "kubectl apply -k deploy" in done.stdout, done.stderr
    files = {path.name: path.read_text() for path in (tmp_path / "deploy").iterdir() if path.suffix != ".whl"}
    _, deployment, _, _ = kubernetes(files)
    assert (deployment.spec.replicas, deployment.metadata.namespace) == (2, "llm")
    done = run("--kind", "k8s", "-o", "secure")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "secure").exists()
