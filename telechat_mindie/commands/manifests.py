"""`telechat-mindie manifests`."""

from __future__ import annotations

from pathlib import Path

import typer

from telechat_mindie.commands.completion import names_in
from telechat_mindie.commands.options import (
    AsJson,
    DeviceMem,
    Force,
    Generation,
    InsecureHttp,
    MaxInputLen,
    MaxSeqLen,
    ModelPath,
    Set,
)
from telechat_mindie.kv_budget import DEFAULT_CARD_GB
from telechat_mindie.mindie import DEFAULT_HOME
from telechat_mindie.service import DEFAULT_GENERATION


def manifests(
    model_path: ModelPath,
    kind: str = typer.Option(
        ..., "--kind", help="docker or k8s.", autocompletion=names_in("service.manifests", "KINDS")
    ),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to make."),
    image: str = typer.Option(None, "--image", help="Image with MindIE and this package; the Dockerfile makes one."),
    replicas: int = typer.Option(
        1, "--replicas", help="Containers, each with as many cards as the model was built for."
    ),
    devices: str = typer.Option(None, "--devices", help="docker: cards, as 0-7 or 0,2,4-5; default: the first ones."),
    namespace: str = typer.Option("mindie", "--namespace", help="k8s: namespace."),
    claim: str = typer.Option(None, "--claim", help="k8s: PersistentVolumeClaim with the model; default: hostPath."),
    tls_secret: str = typer.Option(None, "--tls-secret", help="k8s: Secret with the certificates."),
    resource: str = typer.Option("huawei.com/Ascend910", "--resource", help="k8s: the cards' resource name."),
    mindie_home: str = typer.Option(DEFAULT_HOME, "--mindie-home", help="MindIE's home in the image."),
    shm_gb: int = typer.Option(16, "--shm-gb", help="/dev/shm of a container, in GB."),
    startup_minutes: int = typer.Option(30, "--startup-minutes", help="How long loading may take."),
    wheel: Path = typer.Option(
        None, "--wheel", help="A wheel of this package for the image; default: one of the code that runs here."
    ),
    index_url: str = typer.Option(
        None, "--index-url", help="Package index that has this version, for the image to install it from instead."
    ),
    device_mem: DeviceMem = DEFAULT_CARD_GB,
    max_seq_len: MaxSeqLen = None,
    max_input_len: MaxInputLen = None,
    insecure_http: InsecureHttp = False,
    set_: Set = None,
    mindie: Generation = DEFAULT_GENERATION,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write what runs a model directory in containers: a docker compose file, or Kubernetes manifests.

    Examples:
        telechat-mindie manifests model --kind docker -o deploy
        telechat-mindie manifests model --kind k8s --claim models --tls-secret mindie-tls -o deploy
    """
    from telechat_mindie.commands.output import print_json
    from telechat_mindie.errors import InputError
    from telechat_mindie.model_dir.atb.layout import is_atb
    from telechat_mindie.model_dir.layout import ModelDir
    from telechat_mindie.service.facts import model_facts
    from telechat_mindie.service.manifests import DEFAULT_IMAGE, ManifestOptions, write_manifests
    from telechat_mindie.service.options import ServiceOptions

    service = ServiceOptions(
        devices=devices,
        device_mem_gb=device_mem,
        max_seq_len=max_seq_len,
        max_input_len=max_input_len,
        insecure_http=insecure_http,
        generation=mindie,
        overrides=tuple(set_ or ()),
    )
    options = ManifestOptions(
        kind=kind,
        image=image or DEFAULT_IMAGE,
        replicas=replicas,
        namespace=namespace,
        claim=claim,
        tls_secret=tls_secret,
        mindie_home=mindie_home,
        resource=resource,
        shm_gb=shm_gb,
        startup_minutes=startup_minutes,
        wheel=wheel,
        index_url=index_url,
        service=service,
    )
    if is_atb(model_path):
        raise InputError(
            "was built for backendType atb, for which no images and manifests are known to work",
            where=model_path,
            advice="Start MindIE's own image, and in it: telechat-mindie launch MODEL_PATH.",
        )
    files = write_manifests(output, model_facts(ModelDir.open(model_path)), options, force=force)
    if as_json:
        print_json({"output": str(output), "files": files})
        return
    command = f"kubectl apply -k {output}" if kind == "k8s" else f"docker compose -f {output}/compose.yaml up -d"
    print(f"{output}: {', '.join(files)}")
    print(f"next: docker build --build-arg MINDIE_IMAGE=IMAGE:TAG -t {options.image} {output}")
    print(f"then: {command}")
