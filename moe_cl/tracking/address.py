"""Where a run's numbers go: the address of its MLflow, as given, as kept without credentials, and as found again."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moe_cl.config import ConfigError, TrackConfig
from moe_cl.tracking import redact

DATABASE = "mlflow.db"
KNOWN = ("http://", "https://", "sqlite:", "postgresql", "mysql", "mssql", "databricks")


def embedded(out: Path) -> str:
    """SQLite in the out dir."""
    return f"sqlite:///{out.resolve() / DATABASE}"


def tracking_uri(out: Path, uri: str | None) -> str:
    """Where to: ``uri``, else MLFLOW_TRACKING_URI, else SQLite in the out dir."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or embedded(out)


def check(track: TrackConfig) -> None:
    """Raise ConfigError for an address that can never work (before any process is started)."""
    uri = tracking_uri(Path(), track.uri)
    if uri != "none" and not uri.startswith(KNOWN):
        raise ConfigError(
            f"track.uri: {redact.setting(uri)!r} is no MLflow address; give http(s)://HOST:PORT, sqlite:///FILE or none"
        )
    if uri.startswith("sqlite:///") and not Path(uri[len("sqlite:///") :]).parent.is_dir():
        raise ConfigError(f"track.uri: the folder of {uri} does not exist")


def kept(out: Path) -> str:
    """The address of the run in ``out`` (its ``track.json``). User and password were not kept there.

    Raises ConfigError if it had some and the environment does not give them again.
    """
    uri = json.loads((out / "track.json").read_text()).get("uri")
    if not uri:  # its own data base, whatever the environment says today
        return embedded(out)
    if redact.HIDDEN not in uri:
        return uri
    asked = os.environ.get("MLFLOW_TRACKING_URI", "")
    if asked and redact.bare(redact.setting(asked)) == redact.bare(uri):  # the same server, with credentials
        return asked
    if redact.HIDDEN in redact.bare(uri) or not os.environ.get("MLFLOW_TRACKING_USERNAME"):
        raise ConfigError(
            f"{out}: the credentials of {uri} are not kept: give --track-uri or MLFLOW_TRACKING_URI with them, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return redact.bare(uri)
