"""Arguments of ``python -m serving``, and what is checked before anything is started."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import typer

from serving.address import claim, require_loopback
from serving.asked import Asked
from serving.errors import EngineError, SetupError
from serving.guard.keys import KeyRing
from serving.models import Models
from serving.ray_environment import prepare_environment
from serving.served_model import Place
from serving.settings import Limits, ServiceSettings
from vaefeat.errors import VaefeatError, requiring
from vaefeat.runtime import choose_device

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_DEFAULTS = Limits()


@app.command()
def serve(
    context: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles, or folders whose sub-folders are bundles.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of the Open Inference Protocol over gRPC; none by default."),
    ] = None,
    engine: Annotated[Literal["ray", "local"], typer.Option(help="Ray Serve, or a single process.")] = "ray",
    device: Annotated[
        Literal["auto", "cpu", "cuda", "tensorrt"], typer.Option(help="Where the encoders run.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Processors to compute on; default: all.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that answer; --engine ray.")] = 1,
    keys: Annotated[Path | None, typer.Option(help="File of API keys; see python -m serving.keys.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Load a bundle again when its folder changes.")] = False,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log every request, not only those that fail.")
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Least serious of what is logged.")
    ] = "warning",
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Largest request body.")] = _DEFAULTS.max_body_bytes,
    max_rows: Annotated[int, typer.Option(min=1, help="Most rows in one request.")] = _DEFAULTS.max_rows,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen where other machines can reach it, without --keys.")
    ] = False,
) -> None:
    """Serve bundles over HTTP until Ctrl-C.

    Prints one line, "ready URL ...", to standard output once requests are answered. SIGHUP loads every bundle again.
    """
    asked: Asked = context.obj
    try:
        limits = Limits(max_body_bytes=max_body_bytes, max_rows=max_rows)
        # Absolute, because a replica may run in another folder.
        folders = tuple(bundle.absolute() for bundle in bundles)
        settings = ServiceSettings(
            bundles=folders,
            device=device,
            threads=threads,
            replicas=replicas,
            keys=None if keys is None else keys.absolute(),
            watch=watch,
            access_log=access_log,
            grpc_address="" if grpc_port is None else f"[{host}]:{grpc_port}" if ":" in host else f"{host}:{grpc_port}",
            log_level="info" if access_log and log_level in ("warning", "error") else log_level,
            limits=limits,
        )
        if replicas > 1 and engine == "local":
            raise SetupError(f"got --replicas {replicas} with --engine local, which is one process; use --engine ray")
        if keys is not None:
            KeyRing.from_file(keys)
        elif not insecure:
            require_loopback(host)
        with claim(host, port) as listener:
            (_run_ray if engine == "ray" else _run_local)(settings, listener, asked)
    except (SetupError, EngineError, VaefeatError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, EngineError) else 2) from None


def _run_local(settings: ServiceSettings, listener: socket.socket, asked: Asked) -> None:
    from serving import local_engine

    local_engine.run(settings, listener, asked)


def _run_ray(settings: ServiceSettings, listener: socket.socket, asked: Asked) -> None:
    # Whatever can be found wrong is found before Ray is even imported, which takes seconds.
    choose_device(settings.device)
    Models.from_bundles(settings.bundles, place=Place(device="cpu"))
    prepare_environment()
    if asked.stop.is_set():
        return
    with requiring("serve", what="--engine ray"):
        from serving import ray_engine

    # Ray replaces the main thread's signal handlers by ones that end the process half-way through its start. In
    # another thread it leaves them alone; that thread must live as long as Ray, whose processes end with it.
    with ThreadPoolExecutor(1, thread_name_prefix="ray") as thread:
        thread.submit(ray_engine.run, settings, listener, asked).result()
