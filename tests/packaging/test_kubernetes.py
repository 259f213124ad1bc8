"""The InferenceService is one that KServe knows, and the Dockerfile's commands run."""

import errno
import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
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
        "--namespace",
        "models",
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


@pytest.mark.parametrize("replicas", ["4:1", "0:2", "3", "a:b", "1:10001", f"1:{2**31}", "٣:٤", "1:-1", "1:4\n"])
def test_replicas_that_cannot_be_are_refused(exported: Bundle, tmp_path: Path, replicas: str) -> None:
    done = bca("package", exported.directory, "--kserve", tmp_path / "s.yaml", "--replicas", replicas)
    assert done.exit_code == 2
    assert "replicas" in done.output
    assert not (tmp_path / "s.yaml").exists()


@pytest.mark.parametrize("name", ["Fusion", "fusion_1", "1st", "-a", "a" * 64])
def test_a_name_that_kubernetes_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="Kubernetes takes lower-case letters"):
        kubernetes.inference_service(kubernetes.Options(name))


def test_a_name_that_makes_too_long_a_host_is_refused_with_how_long_it_may_be() -> None:
    fits = kubernetes.Options("a" * (63 - len("-predictor-models")), namespace="models")
    service = kubernetes.inference_service(fits)
    assert service["metadata"]["namespace"] == "models"
    assert "namespace" not in kubernetes.inference_service(kubernetes.Options())["metadata"]
    with pytest.raises(InputError, match=r"has 64 characters, and 63 are allowed; use a --name of at most 46, or a shorter"):
        kubernetes.inference_service(replace(fits, name=f"{fits.name}a"))
    with pytest.raises(InputError, match=r"-predictor-default, which has 64 characters"):
        kubernetes.inference_service(kubernetes.Options("a" * (64 - len("-predictor-default"))))
    with pytest.raises(InputError, match="namespace 'My': Kubernetes takes lower-case letters"):
        kubernetes.inference_service(kubernetes.Options(namespace="My"))


@pytest.mark.parametrize("uri", ["s3://bucket/a", "pvc://claim", "gs://b/c%20d", "hf://org/model", "oci://r/a:1"])
def test_a_storage_uri_that_kserve_reads_is_taken(uri: str) -> None:
    predictor = kubernetes.inference_service(kubernetes.Options(storage_uri=uri))["spec"]["predictor"]
    assert predictor["model"]["storageUri"] == uri


@pytest.mark.parametrize(
    "uri", ["", "models", "/mnt/models", "s3:/b", "s3://", "s4://b/c", "s3://b/c d", "pvc:///p", "s3://b\n"]
)
def test_a_storage_uri_that_kserve_does_not_read_is_refused(uri: str) -> None:
    with pytest.raises(
        InputError, match=r"storage URI .*: give where KServe finds the model repository, such as pvc://CLAIM/PATH"
    ):
        kubernetes.inference_service(kubernetes.Options(storage_uri=uri))


def test_cores_memory_user_and_metrics_are_as_asked(exported: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    flags = ("--cpu", "500m", "--memory", "12Gi", "--run-as", "65532")
    assert bca("package", exported.directory, "--kserve", file, *flags).exit_code == 0
    service = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert unknown_fields(service) == []
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["resources"]["limits"] == {"cpu": "500m", "memory": "12Gi", "nvidia.com/gpu": "1"}
    assert predictor["model"]["securityContext"] == {
        "runAsUser": 65532,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": "8002", "prometheus.io/path": "/metrics"}
    assert predictor["annotations"] == scraped
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
    assert bca("package", exported.directory, "--kserve", file, "--force", "--run-as", "0", "--no-scrape").exit_code == 0
    plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert "securityContext" not in plain["spec"]["predictor"]["model"]
    assert "prometheus" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flag", "amount"), [("cpu", "0"), ("cpu", "2Gi"), ("cpu", "two"), ("memory", "8GB"), ("memory", "-1")]
)
def test_an_amount_that_kubernetes_does_not_take_is_refused(flag: str, amount: str) -> None:
    with pytest.raises(InputError, match=rf"{flag} '{amount}': give an amount as Kubernetes writes it, above 0, such as"):
        kubernetes.inference_service(kubernetes.Options(**{flag: amount}))


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


def environment(token: str | None) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if name != "BCA_TOKEN"}
    return others | ({"BCA_TOKEN": token} if token else {})


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
        refused = subprocess.run([*BCA, *arguments], env=environment(None), capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "--require-token, and there is none; set the variable BCA_TOKEN" in refused.stderr
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*BCA, *arguments], env=environment("secret"), **pipes) as server:
            try:
                until(lambda: subprocess.run(health, check=False, stderr=subprocess.DEVNULL).returncode == 0)
            finally:
                server.terminate()
                assert server.wait(PATIENCE_S) == 0
        assert subprocess.run(health, check=False, stderr=subprocess.DEVNULL).returncode != 0
    assert re.fullmatch(r"python:3\.1[1-3]-slim", found["FROM"])


#: What Docker makes of a word of COPY after the JSON: a shell's escapes go, and what is left is a pattern.
def copied(dockerfile: str) -> str:
    (words,) = re.findall(r"^COPY --chown=bca (.*)$", dockerfile, flags=re.MULTILINE)
    word = json.loads(words)[0]
    assert not re.search(r"(?<!\\)[$'\"]", word), "a shell would read on"
    return re.sub(r"\\(.)", r"\1", word)


@pytest.mark.parametrize(
    "name", ["plain.bca", "two words", "it's", 'a "b"', "$HOME", "${x}", "arr[0]", "a*", "wh?t", "[!a]", "tür"]
)
def test_an_odd_name_of_a_bundle_is_copied_and_no_other(name: str) -> None:
    pattern = copied(kubernetes.dockerfile(Path("/models") / name))
    assert fnmatch.fnmatchcase(name, pattern)
    for other in ("arr0", "ab", "what", "b", f"{name}x", "root"):
        assert not fnmatch.fnmatchcase(other, pattern)


@pytest.mark.parametrize("name", ["a\\b", "a\nRUN true", os.fsdecode(b"caf\xe9")])
def test_a_name_that_a_dockerfile_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"a Dockerfile cannot name .*; rename the bundle"):
        kubernetes.dockerfile(Path("/models") / name)


# ---- all or nothing


def everything(directory: Path, *flags: str | Path) -> tuple[str | Path, ...]:
    return (
        "--triton",
        directory / "models",
        "--kserve",
        directory / "service.yaml",
        "--docker",
        directory / "Dockerfile",
        *flags,
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--replicas", "4:1"),
        ("--storage-uri", "models"),
        ("--cpu", "0"),
        ("--name", "Fusion"),
        ("--tensorrt-version", "x", "--runtime", "tensorrt"),
    ],
)
def test_what_is_refused_leaves_nothing_at_all(exported: Bundle, tmp_path: Path, flags: tuple[str, ...]) -> None:
    done = bca("package", exported.directory, *everything(tmp_path / "new" / "place", *flags))
    assert done.exit_code == 2
    assert list(tmp_path.iterdir()) == []
    assert done.stdout == ""


def test_what_fails_at_the_last_moment_leaves_everything_as_it_was(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("service.yaml", "Dockerfile"):
        (tmp_path / name).write_text("mine")
    real = Path.rename

    def full(path: Path, target: Path) -> Path:
        if Path(target).name == "bca_engine":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", full)
    done = bca("package", exported.directory, *everything(tmp_path, "--force"))
    assert done.exit_code == 2
    assert "No space left on device" in done.output
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"service.yaml": "mine", "Dockerfile": "mine"}


def test_everything_is_written_together_and_nothing_else(exported: Bundle, tmp_path: Path) -> None:
    done = bca("package", exported.directory, *everything(tmp_path / "new"))
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.output.splitlines()] == ["model", "model", "service", "image"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"models", "service.yaml", "Dockerfile"}
    assert {path.name for path in (tmp_path / "new" / "models").iterdir()} == {"bca", "bca_engine"}


def test_two_files_of_one_name_and_a_directory_in_place_of_a_file_are_refused(exported: Bundle, tmp_path: Path) -> None:
    done = bca("package", exported.directory, "--kserve", tmp_path / "a", "--docker", tmp_path / "a")
    assert (done.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "a is given for two things; give each a place of its own" in done.output
    done = bca("package", exported.directory, "--kserve", tmp_path, "--force")
    assert (done.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "is a directory; give the name of a file" in done.output


def test_the_command_that_builds_the_image_can_be_pasted_whatever_the_paths_are(tmp_path: Path) -> None:
    target, bundle = tmp_path / "Docker file;", tmp_path / "my models" / "a bundle"
    words = shlex.split(kubernetes.build_command(target, bundle))
    assert words == ["docker", "build", "-t", "bca", "-f", str(target), str(bundle.parent)]
