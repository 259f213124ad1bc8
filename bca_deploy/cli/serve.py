"""`bca serve`. Heavy imports wait until a command runs."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from bca_deploy.cli.common import BackendFlag, BundleArgument, PrecisionFlag, VerboseFlag, app, check_name, guarded
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
    max_in_flight_mib: Annotated[
        int | None,
        typer.Option(
            help="Requests and answers under way; more get 429 or RESOURCE_EXHAUSTED. "
            "[default: four of the largest requests, at least 64]",
            min=1,
        ),
    ] = None,
    max_connections_per_peer: Annotated[
        int | None,
        typer.Option(help="REST connections from one address; behind an ingress all have one. [default: no limit]", min=1),
    ] = None,
    deadline_s: Annotated[float, typer.Option(help="Longest that a request may take.", min=0.001)] = 30.0,
    grace_s: Annotated[float, typer.Option(help="Longest that stopping waits for requests under way.", min=0)] = 20.0,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the bearer token to ask for. [default: the variable BCA_TOKEN, or none]"),
    ] = None,
    require_token: Annotated[bool, typer.Option("--require-token", help="Do not start without a token.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM; with --tls-key.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    backend: BackendFlag = "auto",
    precision: PrecisionFlag = None,
    threads: Annotated[int | None, typer.Option(help="For onnxruntime on CPU. [default: every core]", min=1, max=1024)] = None,
    access_log: Annotated[bool, typer.Option("--access-log/--no-access-log", help="A line for every request.")] = True,
    verbose: VerboseFlag = False,
) -> None:
    """Serve a bundle: Open Inference Protocol v2 over gRPC and REST, with health and Prometheus metrics.

    SIGTERM and ctrl-C finish the requests under way. Exit codes: 0 stopped, 1 self-test failed, 2 bad input.
    """
    with guarded(verbose, lasting=True):
        from bca_deploy.serving.queue import Limits
        from bca_deploy.serving.server import Options, read_token, serve

        check_name(name)
        _log_to_stderr(access_log)
        options = Options(
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            name=name,
            limits=Limits(max_batch, max_delay_ms, max_queue),
            max_body_bytes=max_body_mib * 2**20 if max_body_mib else None,
            max_in_flight_bytes=max_in_flight_mib * 2**20 if max_in_flight_mib else None,
            max_connections_per_peer=max_connections_per_peer,
            deadline_s=deadline_s,
            grace_s=grace_s,
            token=_token(read_token(token_file), require_token),
            tls=_pair(tls_cert, tls_key),
        )
        serve(bundle, options, backend, precision=precision, threads=threads)


def _token(found: str | None, required: bool) -> str | None:
    if required and found is None:
        raise InputError("--require-token, and there is none; set the variable BCA_TOKEN, or give --token-file FILE")
    return found


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
