"""The InferenceService is one that KServe knows, and the Dockerfile's commands run."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.requests import bca
from support.servers import BCA, PATIENCE_S, free_ports, until

from bca_deploy import __version__
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import InputError
from bca_deploy.packaging import kubernetes


def unknown_fields(service: dict[str, Any]) -> list[str]:
    """The fields that are not in KServe's and Kubernetes' own classes.

    In a process of its own, since KServe's protobuf messages and tritonclient's have the same names.
    """
    script = """
import json, re, sys
import kserve.models, kubernetes.client.models

def unknown(kind, value, place):
    if isinstance(value, list):
        return [name for item in value for name in unknown(re.sub(r"(?i)^list\\[(.*)\\]$", r"\\1", kind), item, place)]
    known = getattr(kserve.models, kind, None) or getattr(kubernetes.client.models, kind, None)
    if known is None or not isinstance(value, dict):
        return []
    kinds = {field: known.openapi_types[attribute] for attribute, field in known.attribute_map.items()}
    return [
        name
        for field, inner in value.items()
        for name in (unknown(kinds[field], inner, f"{place}.{field}") if field in kinds else [f"{place}.{field}"])
    ]

print(json.dumps(unknown("V1beta1InferenceService", json.load(sys.stdin), "")))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input=json.dumps(service), capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def test_kserve_knows_every_field_of_the_service(exported: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    arguments = (
        "--kserve",
        file,
        "--name",
        "fusion",
        "--storage-uri",
        "s3://models/fusion",
        "--gpus",
        "2",
        "--replicas",
        "2:8",
    )
    assert bca("package", exported.directory, *arguments).exit_code == 0
    service = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert unknown_fields(service) == []
    model = service["spec"]["predictor"]["model"]
    model["readinessProbe"]["httpGet"]["pfad"] = model["ports"][0]["unheard"] = 1
    assert unknown_fields(service) == [
        ".spec.predictor.model.ports.unheard",
        ".spec.predictor.model.readinessProbe.httpGet.pfad",
    ], "the check above would not have seen an unknown field"


def test_the_service_says_what_was_asked_for(tmp_path: Path) -> None:
    service = kubernetes.inference_service(kubernetes.Options("fusion", "s3://models/fusion", "26.09-py3", 2, (2, 8)))
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert service["metadata"]["name"] == "fusion"
    assert (predictor["minReplicas"], predictor["maxReplicas"], predictor["scaleMetric"]) == (2, 8, "cpu")
    assert (model["runtimeVersion"], model["storageUri"], model["protocolVersion"]) == (
        "26.09-py3",
        "s3://models/fusion",
        "grpc-v2",
    )
    assert model["resources"]["limits"] == model["resources"]["requests"]
    assert model["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert {model[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")} == {"/v2/health/ready"}
    assert model["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": 8080}


def test_the_front_has_more_shared_memory_than_a_container_gets_of_its_own_accord() -> None:
    predictor = kubernetes.inference_service(kubernetes.Options())["spec"]["predictor"]
    assert predictor["volumes"] == [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}]
    assert predictor["model"]["volumeMounts"] == [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108


@pytest.mark.parametrize("image", ["my/registry/triton:1", "triton:1", "localhost:5000/triton", "a/b@sha256:0f"])
def test_an_image_of_ones_own_takes_the_place_of_the_tag(exported: Bundle, tmp_path: Path, image: str) -> None:
    file = tmp_path / "service.yaml"
    assert bca("package", exported.directory, "--kserve", file, "--image", image).exit_code == 0
    service = yaml.safe_load(file.read_text(encoding="utf-8"))
    model = service["spec"]["predictor"]["model"]
    assert model["image"] == image
    assert "runtimeVersion" not in model
    assert unknown_fields(service) == []


@pytest.mark.parametrize("image", ["", "two words", "-py3", "a" * 129, "my/two words:1", "26.08-py3\n", "/triton"])
def test_what_is_neither_a_tag_nor_an_image_is_refused(exported: Bundle, tmp_path: Path, image: str) -> None:
    with pytest.raises(InputError, match=r"give a tag of NVIDIA's Triton image, as 26\.08-py3, or an image"):
        kubernetes.inference_service(kubernetes.Options(image=image))
    done = bca("package", exported.directory, "--kserve", tmp_path / "service.yaml", f"--image={image}")
    assert done.exit_code == 2
    assert not (tmp_path / "service.yaml").exists()


def test_without_a_gpu_none_is_asked_for() -> None:
    service = kubernetes.inference_service(kubernetes.Options(gpus=0))
    assert set(service["spec"]["predictor"]["model"]["resources"]["limits"]) == {"cpu", "memory"}


@pytest.mark.parametrize("replicas", ["4:1", "0:2", "3", "a:b"])
def test_replicas_that_cannot_be_are_refused(exported: Bundle, tmp_path: Path, replicas: str) -> None:
    done = bca("package", exported.directory, "--kserve", tmp_path / "s.yaml", "--replicas", replicas)
    assert done.exit_code == 2
    assert "replicas" in done.output
    assert not (tmp_path / "s.yaml").exists()


@pytest.mark.parametrize("name", ["Fusion", "fusion_1", "1st", "-a", "a" * 64])
def test_a_name_that_kubernetes_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="Kubernetes takes lower-case letters"):
        kubernetes.inference_service(kubernetes.Options(name))


@pytest.mark.parametrize("name", ["../fusion", "a/b", "", ".", "two words", "tür"])
def test_a_name_that_is_no_part_of_a_path_or_url_is_refused(exported: Bundle, tmp_path: Path, name: str) -> None:
    for arguments in (["package", exported.directory, "--triton", tmp_path / "models"], ["serve", exported.directory]):
        done = bca(*arguments, "--name", name)
        assert done.exit_code == 2
        assert "give letters, digits, '_', '.' and '-'" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_by_force(exported: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("mine")
    done = bca("package", exported.directory, "--kserve", file)
    assert (done.exit_code, file.read_text()) == (2, "mine")
    assert "exists; use --force to replace it" in done.output
    assert bca("package", exported.directory, "--kserve", file, "--force").exit_code == 0


def instructions(dockerfile: Path) -> dict[str, str]:
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def test_the_dockerfiles_commands_serve_the_bundle_and_find_it_healthy(exported: Bundle, tmp_path: Path) -> None:
    done = bca("package", exported.directory, "--docker", tmp_path / "Dockerfile")
    assert done.exit_code == 0, done.output
    found = instructions(tmp_path / "Dockerfile")
    assert f"pip install --no-cache-dir 'bca-deploy[serve,cpu]=={__version__}'" in (tmp_path / "Dockerfile").read_text()
    assert found["USER"] == "10001", "not root"
    context = done.output.strip().rsplit(" ", 1)[1]
    source, target = json.loads(found["COPY"].split(" ", 1)[1])
    assert (Path(context) / source).resolve() == exported.directory.resolve()
    with free_ports(2) as ports:
        http, grpc = map(str, ports)
        swap = {target: str(exported.directory), "0.0.0.0": "127.0.0.1", "8080": http, "9000": grpc}  # noqa: S104
        program, *arguments = (swap.get(word, word) for word in json.loads(found["ENTRYPOINT"]))
        assert program == "bca"
        health = json.loads(found["HEALTHCHECK"].split(" CMD ", 1)[1])
        health = [sys.executable, *(word.replace("8080", http) for word in health[1:])]
        with subprocess.Popen([*BCA, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                until(lambda: subprocess.run(health, check=False, stderr=subprocess.DEVNULL).returncode == 0)
            finally:
                server.terminate()
                assert server.wait(PATIENCE_S) == 0
        assert subprocess.run(health, check=False, stderr=subprocess.DEVNULL).returncode != 0
    assert re.fullmatch(r"python:3\.1[1-3]-slim", found["FROM"])


def test_the_command_that_builds_the_image_can_be_pasted_whatever_the_paths_are(tmp_path: Path) -> None:
    target, bundle = tmp_path / "Docker file;", tmp_path / "my models" / "a bundle"
    words = shlex.split(kubernetes.write_docker(target, bundle))
    assert words == ["docker", "build", "-t", "bca", "-f", str(target), str(bundle.parent)]
