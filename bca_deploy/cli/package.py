"""`bca package`. Heavy imports wait until a command runs."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from bca_deploy.cli.common import BundleArgument, VerboseFlag, app, check_name, guarded
from bca_deploy.errors import InputError


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
    namespace: Annotated[
        str | None, typer.Option(help="KServe: where the service goes. [default: where it is applied]")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="KServe: tag of NVIDIA's Triton image, or an image, as registry/triton:1. [default: 26.08-py3]"),
    ] = None,
    gpus: Annotated[int, typer.Option(help="KServe: per replica; 0 for the CPU.", min=0)] = 1,
    cpu: Annotated[str, typer.Option(help="KServe: cores per replica, as 2 or 500m.")] = "2",
    memory: Annotated[str, typer.Option(help="KServe: memory per replica, as 8Gi.")] = "8Gi",
    replicas: Annotated[str, typer.Option(help="KServe: fewest and most, as 1:4.")] = "1:4",
    run_as: Annotated[
        int,
        typer.Option(
            help="KServe: the user, by number, that the container runs as, without privileges; 0 leaves the image's own.",
            min=0,
            max=2**31 - 1,
        ),
    ] = 1000,
    scrape: Annotated[
        bool, typer.Option("--scrape/--no-scrape", help="KServe: annotate the pods, so that Prometheus finds their metrics.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a file; a model repository is never replaced.")] = False,
    verbose: VerboseFlag = False,
) -> None:
    """Write what other servers need to run a bundle: all that is asked for, or nothing.

    Exit codes: 0 done, 2 bad input.
    """
    with guarded(verbose):
        from bca_deploy.bundle.read import Bundle
        from bca_deploy.packaging import kubernetes, triton_repository
        from bca_deploy.packaging.placing import together

        if not (triton or kserve or docker):
            raise InputError("give --triton DIRECTORY, --kserve FILE or --docker FILE; more than one is fine")
        check_name(name)
        for file in (kserve, docker):
            _check_free(file, force)
        said = []
        with Bundle.open(bundle) as opened, together() as placing:
            if kserve:
                tag = kubernetes.TRITON_IMAGE if image is None else image
                service = kubernetes.Options(
                    name, storage_uri, tag, gpus, _replicas(replicas), memory, cpu, namespace, run_as or None, scrape
                )
                placing.staged(kserve).write_text(kubernetes.service_yaml(service), encoding="utf-8")
                said.append(f"service: {kserve}; apply it with kubectl apply -f {kserve}")
            if docker:
                placing.staged(docker).write_text(kubernetes.dockerfile(bundle.resolve()), encoding="utf-8")
                said.append(f"image: {kubernetes.build_command(docker, bundle.resolve())}")
            if triton:
                options = triton_repository.Options(name, runtime, tensorrt_version, max_batch, max_delay_ms)
                said = [f"model: {made}" for made in triton_repository.stage(opened, triton, options, placing)] + said
        for line in said:
            typer.echo(line)


def _check_free(file: Path | None, force: bool) -> None:
    if file is not None and file.is_dir():
        raise InputError(f"{file} is a directory; give the name of a file")
    if file is not None and file.exists() and not force:
        raise InputError(f"{file} exists; use --force to replace it, or choose another name")


def _replicas(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if not found:
        raise InputError(f"replicas {text!r}: give the fewest and the most, as 1:4")
    return int(found[1]), int(found[2])
