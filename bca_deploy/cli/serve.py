"""`bca serve` and `bca package`. Heavy imports wait until a command runs."""

import logging
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from bca_deploy.cli.common import BackendFlag, BundleArgument, PrecisionFlag, VerboseFlag, app, guarded
from bca_deploy.errors import InputError


@app.command("serve")
def serve_command(  # noqa: PLR0913  (one parameter per option)
    bundle: BundleArgument,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 opens the server to the network.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="For REST; 0 takes a free one.", min=0, max=65535)] = 8080,
    grpc_port: Annotated[int, typer.Option(help="For gRPC; 0 takes a free one.", min=0, max=65535)] = 8081,
    name: Annotated[str, typer.Option(help="Of the model in URLs.")] = "bca",
    max_batch: Annotated[
        int | None,
        typer.Option(help="Requests that may run together. [default: on the CPU two for each core, else 16]", min=1),
    ] = None,
    max_delay_ms: Annotated[float, typer.Option(help="How long the first of them waits for more.", min=0)] = 0.0,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429 or RESOURCE_EXHAUSTED.", min=1)] = 64,
    max_body_mib: Annotated[
        int | None,
        typer.Option(help="Largest request. [default: what the bundle's largest shapes need]", min=1),
    ] = None,
    deadline_s: Annotated[float, typer.Option(help="Longest that a request may take.", min=0.001)] = 30.0,
    grace_s: Annotated[float, typer.Option(help="Longest that stopping waits for requests under way.", min=0)] = 20.0,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the bearer token to ask for. [default: the variable BCA_TOKEN, or none]"),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM; with --tls-key.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    backend: BackendFlag = "auto",
    precision: PrecisionFlag = None,
    threads: Annotated[int | None, typer.Option(help="For onnxruntime on CPU. [default: every core]", min=1)] = None,
    access_log: Annotated[bool, typer.Option("--access-log/--no-access-log", help="A line for every request.")] = True,
    verbose: VerboseFlag = False,
) -> None:
    """Serve a bundle: Open Inference Protocol v2 over gRPC and REST, with health and Prometheus metrics.

    SIGTERM and ctrl-C finish the requests under way. Exit codes: 0 stopped, 1 self-test failed, 2 bad input.
    """
    with guarded(verbose, lasting=True):
        from bca_deploy.serving.queue import Limits
        from bca_deploy.serving.server import Options, read_token, serve

        _check_name(name)
        _log_to_stderr(access_log)
        options = Options(
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            name=name,
            limits=Limits(max_batch, max_delay_ms, max_queue),
            max_body_bytes=max_body_mib * 2**20 if max_body_mib else None,
            deadline_s=deadline_s,
            grace_s=grace_s,
            token=read_token(token_file),
            tls=_pair(tls_cert, tls_key),
        )
        serve(bundle, options, backend, precision=precision, threads=threads)


def _check_name(name: str) -> None:
    """It becomes part of URLs and of paths."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"--name {name!r}: give letters, digits, '_', '.' and '-', beginning with a letter or digit")


def _pair(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InputError("--tls-cert and --tls-key go together; give both or neither")
    return certificate, key


def _log_to_stderr(access_log: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("bca_deploy.access")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if access_log else logging.CRITICAL)


@app.command("package")
def package_command(  # noqa: PLR0913  (one parameter per option)
    bundle: BundleArgument,
    triton: Annotated[Path | None, typer.Option(help="Write a Triton model repository into this directory.")] = None,
    kserve: Annotated[Path | None, typer.Option(help="Write a KServe InferenceService, YAML.")] = None,
    docker: Annotated[Path | None, typer.Option(help="Write a Dockerfile for bca serve.")] = None,
    name: Annotated[str, typer.Option(help="Of the model, or of the service.")] = "bca",
    runtime: Annotated[
        Literal["auto", "tensorrt", "onnxruntime"],
        typer.Option(help="Triton: what runs the engine model; auto takes the bundle's tensorrt engine where it has one."),
    ] = "auto",
    tensorrt_version: Annotated[
        str | None, typer.Option(help="Triton: the server's; an engine it cannot load is refused.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Triton: rows that the front takes at once; never fewer than the model takes.", min=1)
    ] = 64,
    max_delay_ms: Annotated[float, typer.Option(help="Triton: how long the first request waits for more.", min=0)] = 5.0,
    storage_uri: Annotated[str, typer.Option(help="KServe: where the model repository lies.")] = "pvc://models/bca",
    image: Annotated[
        str | None,
        typer.Option(help="KServe: tag of NVIDIA's Triton image, or an image, as registry/triton:1. [default: 26.08-py3]"),
    ] = None,
    gpus: Annotated[int, typer.Option(help="KServe: per replica; 0 for the CPU.", min=0)] = 1,
    replicas: Annotated[str, typer.Option(help="KServe: fewest and most, as 1:4.")] = "1:4",
    force: Annotated[bool, typer.Option("--force", help="Replace a file; a model repository is never replaced.")] = False,
    verbose: VerboseFlag = False,
) -> None:
    """Write what other servers need to run a bundle.

    Exit codes: 0 done, 2 bad input.
    """
    with guarded(verbose):
        from bca_deploy.bundle.read import Bundle
        from bca_deploy.packaging import kubernetes
        from bca_deploy.packaging.triton_repository import Options, write

        if not (triton or kserve or docker):
            raise InputError("give --triton DIRECTORY, --kserve FILE or --docker FILE; more than one is fine")
        _check_name(name)
        for file in (kserve, docker):
            _check_free(file, force)
        with Bundle.open(bundle) as opened:
            if triton:
                options = Options(name, runtime, tensorrt_version, max_batch, max_delay_ms)
                for directory in write(opened, triton, options):
                    typer.echo(f"model: {directory}")
        if kserve:
            tag = kubernetes.TRITON_IMAGE if image is None else image
            kubernetes.write_kserve(kserve, kubernetes.Options(name, storage_uri, tag, gpus, _replicas(replicas)))
            typer.echo(f"service: {kserve}; apply it with kubectl apply -f {kserve}")
        if docker:
            typer.echo(f"image: {kubernetes.write_docker(docker, bundle.resolve())}")


def _check_free(file: Path | None, force: bool) -> None:
    if file is not None and file.exists() and not force:
        raise InputError(f"{file} exists; use --force to replace it, or choose another name")


def _replicas(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition(":")
    if not (fewest.isdecimal() and most.isdecimal()):
        raise InputError(f"replicas {text!r}: give the fewest and the most, as 1:4")
    return int(fewest), int(most)
