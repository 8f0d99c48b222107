"""What a service is started with."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from serving.errors import SetupError
from serving.served_model import Place

__all__ = ["Limits", "ServiceSettings"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that keep one client from taking the service away from the others.

    Parameters
    ----------
    max_body_bytes : int
        Largest request body; a larger one is refused with 413 as soon as its length is known.
    max_rows : int
        Most rows in one request.
    max_connections : int
        Connections that may be open at the same time; further ones are told 503 and closed.
    max_in_flight : int
        Requests with a body that are answered at the same time; further ones are refused with 503.
    max_in_flight_bytes : int
        What their bodies may take together, which bounds the memory that clients can occupy.
    body_timeout_s : float
        Time within which a whole body must have arrived, in seconds; 408 after that.
    compute_timeout_s : float
        Time from a complete body to its answer, waiting included, in seconds; 503 after that.
    worker_threads : int
        Threads that decode and encode what is too large for the event loop.
    max_batch_rows : int
        Most rows in a batch; 256 keeps activations in a processor's cache.
    max_queued_rows, max_queued_bytes : int
        Rows that may wait for the device, and what they may take; further ones are refused with 503.
    inline_bytes : int
        Bodies up to this size are decoded on the event loop: handing them to a thread would take longer.
    images_per_task : int
        Images that one thread decodes before others get a turn; fewer where they are large.
    max_image_pixels : int
        Most pixels of an image, as its header says, and of all that are being decoded; one takes up to twenty bytes.

    Raises
    ------
    SetupError
        A bound that is not positive.
    """

    max_body_bytes: int = 64 * 2**20
    max_rows: int = 16_384
    max_connections: int = 8192
    max_in_flight: int = 1024
    max_in_flight_bytes: int = 512 * 2**20
    body_timeout_s: float = 60.0
    compute_timeout_s: float = 60.0
    worker_threads: int = 4
    max_batch_rows: int = 256
    max_queued_rows: int = 262_144
    max_queued_bytes: int = 512 * 2**20
    inline_bytes: int = 262_144
    images_per_task: int = 64
    max_image_pixels: int = 25_000_000

    def __post_init__(self) -> None:
        for bound in fields(self):
            if not getattr(self, bound.name) > 0:
                raise SetupError(f"got {bound.name}={getattr(self, bound.name)}, wanted more than 0")


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Everything that is decided on the command line, whatever the engine.

    Parameters
    ----------
    bundles : tuple of Path
        Folders of the bundles to serve.
    device : {"auto", "cpu", "cuda", "tensorrt"}
        Where the encoders run.
    threads : int, optional
        Processors that a replica computes on; all that are available when None.
    replicas : int
        Processes, under Ray; each holds the models.
    keys : Path, optional
        File of API keys; without it nobody is asked for one.
    watch : bool
        Whether a bundle whose folder changes is loaded again by itself.
    access_log : bool
        A line for every request, not only for those that fail.
    log_level : {"debug", "info", "warning", "error"}
    grpc_address : str
        Host and port of gRPC; empty for none.
    limits : Limits
    """

    bundles: tuple[Path, ...]
    device: str = "auto"
    threads: int | None = None
    replicas: int = 1
    keys: Path | None = None
    watch: bool = False
    access_log: bool = False
    log_level: str = "warning"
    grpc_address: str = ""
    limits: Limits = field(default_factory=Limits)

    @property
    def place(self) -> Place:
        """Where models are computed."""
        return Place(device=self.device, threads=self.threads, max_batch_rows=self.limits.max_batch_rows)
