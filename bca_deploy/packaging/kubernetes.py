"""What a cluster needs to run a bundle: the InferenceService for KServe, and a Dockerfile for `bca serve`."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bca_deploy import __version__, optional
from bca_deploy.errors import InputError

#: Tag of NVIDIA's image of Triton, by month.
TRITON_IMAGE = "26.08-py3"
#: The ports of KServe's Triton runtime.
HTTP_PORT, GRPC_PORT = 8080, 9000
#: Most of it; it counts as the container's memory as far as it is used.
SHARED_MEMORY = "2Gi"


@dataclass(frozen=True)
class Options:
    """How the service runs.

    Attributes:
        name: of the service.
        storage_uri: where the model repository lies, as KServe's storage initializer reads it.
        image: tag of NVIDIA's Triton image, or with a ``/`` or ``:`` an image of your own.
        gpus: per replica; 0 for the CPU.
        replicas: fewest and most.
        memory: per replica.
        cpu: cores per replica.
    """

    name: str = "bca"
    storage_uri: str = "pvc://models/bca"
    image: str = TRITON_IMAGE
    gpus: int = 1
    replicas: tuple[int, int] = (1, 4)
    memory: str = "8Gi"
    cpu: str = "2"


def inference_service(options: Options) -> dict[str, Any]:
    """Return the InferenceService: Triton under KServe, gRPC, on plain Deployments.

    Raises:
        InputError: fewer than one replica, more at least than at most, a name that Kubernetes does not take, or no image.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", options.name):
        raise InputError(f"name {options.name!r}: Kubernetes takes lower-case letters, digits and '-', at most 63; use --name")
    fewest, most = options.replicas
    if not 1 <= fewest <= most:
        raise InputError(f"replicas {fewest} to {most}: at least 1, and the first number not above the second")
    resources = {"cpu": options.cpu, "memory": options.memory}
    if options.gpus:
        resources["nvidia.com/gpu"] = str(options.gpus)
    model = {
        "modelFormat": {"name": "triton"},
        **_image(options.image),
        "protocolVersion": "grpc-v2",
        "storageUri": options.storage_uri,
        "ports": [{"name": "h2c", "containerPort": GRPC_PORT, "protocol": "TCP"}],
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108  (where Triton looks for it)
        **_probes(),
    }
    predictor = {
        "minReplicas": fewest,
        "maxReplicas": most,
        "scaleMetric": "cpu",
        "scaleTarget": 70,
        "timeout": 30,
        "model": model,
        # Tensors pass between Triton and the front in shared memory, and Kubernetes gives 64 MiB of it.
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}}],
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": options.name,
            "annotations": {
                "serving.kserve.io/deploymentMode": "RawDeployment",
                "serving.kserve.io/autoscalerClass": "hpa",
            },
        },
        "spec": {"predictor": predictor},
    }


def _image(given: str) -> dict[str, str]:
    if re.search("[/:]", given) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*", given):
        return {"image": given}
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", given):
        return {"runtimeVersion": given}
    raise InputError(
        f"image {given!r}: give a tag of NVIDIA's Triton image, as {TRITON_IMAGE}, or an image, as registry/triton:1"
    )


def _probes() -> dict[str, Any]:
    """Starting may take minutes (engines load, the warm-up runs); a running server answers at once."""

    def probe(path: str, **times: int) -> dict[str, Any]:
        return {"httpGet": {"path": f"/v2/health/{path}", "port": HTTP_PORT}, **times}

    return {
        "startupProbe": probe("ready", periodSeconds=5, failureThreshold=60),
        "readinessProbe": probe("ready", periodSeconds=5, failureThreshold=2),
        "livenessProbe": probe("live", periodSeconds=10, failureThreshold=3),
    }


def write_kserve(target: Path, options: Options) -> None:
    """Write the InferenceService as YAML.

    Raises:
        MissingDependencyError: PyYAML is not installed.
    """
    yaml = optional.load("yaml", "pyyaml", "package")
    text = yaml.safe_dump(inference_service(options), sort_keys=False)
    target.write_text(text, encoding="utf-8")


def write_docker(target: Path, bundle: Path) -> str:
    """Write a Dockerfile that serves the bundle, and return the command that builds it.

    The server in it binds every address, as a container must: give the token in the variable ``BCA_TOKEN``.
    """
    command = ["bca", "serve", "/bundle", "--host", "0.0.0.0", "--http-port", str(HTTP_PORT), "--grpc-port", str(GRPC_PORT)]  # noqa: S104
    health = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{HTTP_PORT}/v2/health/ready', timeout=2)"
    lines = [
        "FROM python:3.12-slim",
        f"RUN pip install --no-cache-dir 'bca-deploy[serve,cpu]=={__version__}'",
        "RUN useradd --system --uid 10001 bca",
        f"COPY --chown=bca {json.dumps([bundle.name, '/bundle'])}",
        "USER 10001",
        f"EXPOSE {HTTP_PORT} {GRPC_PORT}",
        f"HEALTHCHECK --interval=5s --start-period=10s CMD {json.dumps(['python', '-c', health])}",
        "STOPSIGNAL SIGTERM",
        f"ENTRYPOINT {json.dumps(command)}",
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"docker build -t bca -f {shlex.quote(str(target))} {shlex.quote(str(bundle.parent))}"
