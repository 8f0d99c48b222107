"""``python -m serving.keys new --id NAME --scope embed``: make an API key.

The key is printed once, to standard output; the file gets its hash. A running service takes the file over by itself.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
from pathlib import Path
from typing import Annotated

import typer

from serving.errors import SetupError
from serving.guard.keys import SCOPES, Key, KeyRing
from vaefeat.atomic import replace_file

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="API keys of the service.")


@app.callback()
def choose() -> None:
    """Manage API keys; a key is revoked by deleting its table from the file."""


@app.command()
def new(
    name: Annotated[str, typer.Option("--id", help="Whose key it is; the name that logs show.")],
    scope: Annotated[list[str], typer.Option(help=f"What it may do, of {', '.join(SCOPES)}; may be given again.")],
    file: Annotated[Path, typer.Option(help="The key file; made when there is none.")] = Path("keys.toml"),
    rows_per_s: Annotated[float | None, typer.Option(help="Bound on its rows in a second.")] = None,
    bytes_per_s: Annotated[float | None, typer.Option(help="Bound on its bytes in a second.")] = None,
    days: Annotated[float | None, typer.Option(min=0.01, max=36_500, help="It expires after so many days.")] = None,
) -> None:
    """Make a key, print it once, and append its hash to the file."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    expires = None if days is None else now + datetime.timedelta(days=days)
    try:
        key = Key(id=name, scopes=frozenset(scope), rows_per_s=rows_per_s, bytes_per_s=bytes_per_s)
        before = _content(file, name)
        # The prefix is for scanners that look for secrets in repositories.
        secret = "vf_" + secrets.token_urlsafe(32)
        replace_file(file, before + _table(key, secret, made=now, expires=expires).encode(), private=True)
    except (SetupError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"added {key.id} to {file}; the key follows, and nothing can show it again:", err=True)
    typer.echo(secret)


def _content(file: Path, name: str) -> bytes:
    if not file.exists():
        return b"# Made by python -m serving.keys. Delete a table to revoke its key.\n"
    if name in KeyRing.from_file(file).ids:
        raise SetupError(f"got the id {name}, which has a key in {file}; choose another, or delete its table first")
    return file.read_bytes()


def _table(key: Key, secret: str, *, made: datetime.datetime, expires: datetime.datetime | None) -> str:
    lines = [
        f"\n[keys.{key.id}]",
        f"# Made {made.isoformat()}",
        f'sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"',
        f"scopes = {sorted(key.scopes)}",
    ]
    if key.rows_per_s is not None:
        lines.append(f"rows_per_s = {key.rows_per_s}")
    if key.bytes_per_s is not None:
        lines.append(f"bytes_per_s = {key.bytes_per_s}")
    if expires is not None:
        lines.append(f"expires = {expires.isoformat()}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
