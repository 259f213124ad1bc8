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
#: Of Triton, for Prometheus.
METRICS_PORT = 8002
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
        namespace: where the service goes; None leaves it to whoever applies the file.
        run_as: the user that the container runs as, without privileges; None leaves the image's own, often root.
        scrape: annotate the pods, so that Prometheus finds Triton's metrics.
    """

    name: str = "bca"
    storage_uri: str = "pvc://models/bca"
    image: str = TRITON_IMAGE
    gpus: int = 1
    replicas: tuple[int, int] = (1, 4)
    memory: str = "8Gi"
    cpu: str = "2"
    namespace: str | None = None
    run_as: int | None = 1000
    scrape: bool = True


def inference_service(options: Options) -> dict[str, Any]:
    """Return the InferenceService: Triton under KServe, gRPC, on plain Deployments.

    Raises:
        InputError: fewer than one replica, more at least than at most, or a name, place, image or amount that Kubernetes or
            KServe does not take.
    """
    _check(options)
    fewest, most = options.replicas
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
        **({} if options.run_as is None else {"securityContext": _unprivileged(options.run_as)}),
        **_probes(),
    }
    predictor = {
        **({"annotations": _SCRAPED} if options.scrape else {}),
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
            **({"namespace": options.namespace} if options.namespace else {}),
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",  # before KServe 0.16: RawDeployment
                "serving.kserve.io/autoscalerClass": "hpa",
                **({"serving.kserve.io/enable-prometheus-scraping": "true"} if options.scrape else {}),
            },
        },
        "spec": {"predictor": predictor},
    }


#: What Prometheus reads on a pod, where it looks for pods at all.
_SCRAPED = {"prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS_PORT), "prometheus.io/path": "/metrics"}

#: What KServe's storage initializer reads.
_SCHEMES = ("pvc", "s3", "gs", "hf", "oci", "https", "http", "hdfs", "webhdfs", "file")
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_MOST_REPLICAS = 10_000


def _check(options: Options) -> None:
    if not re.fullmatch(r"(?=[a-z])" + _LABEL, options.name):
        raise InputError(f"name {options.name!r}: Kubernetes takes lower-case letters, digits and '-', at most 63; use --name")
    if options.namespace is not None and not re.fullmatch(_LABEL, options.namespace):
        raise InputError(f"namespace {options.namespace!r}: Kubernetes takes lower-case letters, digits and '-', at most 63")
    _check_host(options.name, options.namespace or "default")
    _check_storage(options.storage_uri)
    fewest, most = options.replicas
    if not 1 <= fewest <= most <= _MOST_REPLICAS:
        raise InputError(
            f"replicas {fewest} to {most}: at least 1, at most {_MOST_REPLICAS}, and the first number not above the second"
        )
    for what, given, unit in (("cpu", options.cpu, "m"), ("memory", options.memory, "Ki|Mi|Gi|Ti|k|M|G|T")):
        if not re.fullmatch(rf"(?=.*[1-9])[0-9]{{1,15}}(\.[0-9]{{1,3}})?({unit})?", given):
            raise InputError(f"{what} {given!r}: give an amount as Kubernetes writes it, above 0, such as 2, 500m or 8Gi")


def _check_host(name: str, namespace: str) -> None:
    """KServe makes one label of a host name of both, and never gets the service ready where it is too long."""
    label = f"{name}-predictor-{namespace}"
    if len(label) > 63:
        raise InputError(
            f"name {name!r}: KServe calls the host {label}, which has {len(label)} characters, and 63 are allowed; "
            f"use a --name of at most {max(63 - len(label) + len(name), 0)}, or a shorter --namespace"
        )


def _check_storage(uri: str) -> None:
    scheme, _, rest = uri.partition("://")
    if scheme not in _SCHEMES or not re.fullmatch(r"[A-Za-z0-9][!-~]*", rest):
        raise InputError(
            f"storage URI {uri!r}: give where KServe finds the model repository, such as pvc://CLAIM/PATH or s3://BUCKET/PATH; "
            f"it begins with {', '.join(f'{scheme}://' for scheme in _SCHEMES)}"
        )


def _unprivileged(user: int) -> dict[str, Any]:
    """What Kubernetes' restricted profile asks of a container."""
    return {
        "runAsUser": user,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
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


def service_yaml(options: Options) -> str:
    """Return the InferenceService as YAML.

    Raises:
        InputError: see :func:`inference_service`.
        MissingDependencyError: PyYAML is not installed.
    """
    yaml = optional.load("yaml", "pyyaml", "package")
    return str(yaml.safe_dump(inference_service(options), sort_keys=False))


def dockerfile(bundle: Path) -> str:
    """Return a Dockerfile that serves the bundle.

    The server in it binds every address, as a container must, and does not start without a token, in the variable ``BCA_TOKEN``
    or a ``--token-file``.

    Raises:
        InputError: the bundle has a name that a Dockerfile cannot hold.
    """
    ports = ["--http-port", str(HTTP_PORT), "--grpc-port", str(GRPC_PORT)]
    command = ["bca", "serve", "/bundle", "--host", "0.0.0.0", *ports, "--require-token"]  # noqa: S104
    health = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{HTTP_PORT}/v2/health/ready', timeout=2)"
    lines = [
        "FROM python:3.12-slim",
        f"RUN pip install --no-cache-dir 'bca-deploy[serve,cpu]=={__version__}'",
        "RUN useradd --system --uid 10001 bca",
        f"COPY --chown=bca {json.dumps([_copied(bundle.name), '/bundle'])}",
        "USER 10001",
        f"EXPOSE {HTTP_PORT} {GRPC_PORT}",
        f"HEALTHCHECK --interval=5s --start-period=10s CMD {json.dumps(['python', '-c', health])}",
        "STOPSIGNAL SIGTERM",
        f"ENTRYPOINT {json.dumps(command)}",
    ]
    return "\n".join(lines) + "\n"


def _copied(name: str) -> str:
    """Return a file's name as COPY takes it: after the JSON it is a word of a shell, and then a pattern of file names."""
    if not name.isprintable() or "\\" in name:
        raise InputError(f"a Dockerfile cannot name {name!r}; rename the bundle, without backslashes and what does not print")
    pattern = re.sub(r"[*?[]", r"[\g<0>]", name)
    return re.sub(r"[$'\"]", r"\\\g<0>", pattern)


def build_command(target: Path, bundle: Path) -> str:
    """Return the command that builds the image of the Dockerfile at ``target``."""
    return f"docker build -t bca -f {shlex.quote(str(target))} {shlex.quote(str(bundle.parent))}"
