"""What one host has to say about itself before a job: ``python -m moe_cl doctor`` asks every host for this."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psutil

from moe_cl import config
from moe_cl.config import ConfigError
from moe_cl.data.shard import Shard, ShardIndex, index_url, is_remote, read_bytes
from moe_cl.tracking import redact

ROOT = Path(__file__).resolve().parents[2]
WRITE_BYTES = 64 << 20
# What every answer holds. A host with another age of this code may answer otherwise.
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("host", "python", "code", "compiler", "kind", "collectives", "experts"), str),
    **dict.fromkeys(("packages", "interfaces", "disk", "tracking"), dict),
    **dict.fromkeys(("ninja", "port_free"), bool),
    "memory_gib": float,
    "devices": list,
}


def pins() -> dict[str, str]:
    """Package -> version of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().split()
    return dict(line.split("==", 1) for line in lines if "==" in line)


def packages() -> dict[str, str]:
    """Installed version of every pinned package; ``missing`` where there is none."""
    found = {}
    for name in pins():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def code() -> str:
    """A digest of the sources, recipes left out (what a recipe says is in the digest of the config)."""
    digest = hashlib.sha256()
    kinds = ("*.py", "*.cpp", "*.h")
    sources = sorted(path for kind in kinds for path in (ROOT / "moe_cl").rglob(kind))
    for path in [*sources, ROOT / "requirements.txt"]:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def settings(cfg: config.RunConfig) -> str:
    """A digest of everything a run is told: its whole config, and the DeepSpeed JSON that it names."""
    from moe_cl.engine.checks import read_json

    tree = [config.to_tree(cfg), read_json(cfg.engine.ds_config)]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def compiler() -> str:
    """First line of ``g++ --version``, or ``missing``."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return "missing"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    return done.stdout.split("\n", 1)[0]


def accelerators() -> dict[str, Any]:
    """Kind, names and memory (GiB) of the devices torch sees, and the collective library between them."""
    import torch

    if not torch.cuda.is_available():
        return {"kind": "cpu", "devices": [], "collectives": "gloo"}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{d.name} {d.total_memory / 2**30:.0f} GiB" for d in devices]
    return {"kind": "cuda", "devices": names, "collectives": f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}"}


def experts() -> str:
    """What computes experts here: the compiled kernels, or torch's products (other bits, slower), and why those."""
    import torch

    from moe_cl.moe import kernels

    loaded = kernels.load() if torch.backends.mkldnn.is_available() else None
    known = (("fp32", torch.float32), ("bf16", torch.bfloat16))
    if types := [name for name, dtype in known if loaded is not None and loaded.works(dtype)]:
        return f"compiled kernels ({', '.join(types)})"
    if os.environ.get("MOE_CL_KERNELS") == "0":
        return "torch's products: MOE_CL_KERNELS=0"
    if loaded is not None:
        return "torch's products: not for this processor"
    return f"torch's products: {'no compiler' if compiler() == 'missing' else 'the kernels do not compile'}"


def interfaces() -> dict[str, str]:
    """IPv4 address of each interface that is up, the loopback left out."""
    stats = psutil.net_if_stats()
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and name != "lo" and name in stats and stats[name].isup
    }


def disk(out: Path) -> dict[str, Any]:
    """The folder where ``out`` is, or will be, its free GiB and synced write speed (MB/s); ``error`` if it cannot be
    written."""
    folder = out.absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        begin = time.perf_counter()
        with tempfile.TemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(os.urandom(1 << 20) * (WRITE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
        speed = WRITE_BYTES / (time.perf_counter() - begin) / 1e6
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return {"error": f"{folder}: {error.strerror}; choose another --out, or make it writable"}
    return {"folder": str(folder), "free_gib": free, "write_mb_s": speed}


def data_set(pattern: str) -> dict[str, Any]:
    """Samples and a digest of what ``pattern`` names here (shards, sizes, hashes, indexes), or what is wrong with it.

    Of local shards the files themselves are looked at: each tar's size, and each index.
    """
    from moe_cl.data.index import resolve

    digest, wrong = hashlib.sha256(), []
    try:
        dataset = resolve(pattern)
        for shard in dataset.shards:
            digest.update(json.dumps([shard.name, shard.samples, shard.bytes, shard.sha256]).encode())
            if not is_remote(shard.url):
                wrong += _shard(shard, digest)
    except (ConfigError, OSError) as error:
        return {"error": str(error)}
    if wrong:
        return {"error": wrong[0] + (f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else "")}
    return {"samples": len(dataset), "digest": digest.hexdigest()[:16]}


def _shard(shard: Shard, digest: Any) -> list[str]:
    """What is wrong with a shard's files here; its index goes into ``digest``."""
    size = os.path.getsize(shard.url)
    if shard.bytes and size != shard.bytes:
        return [f"{shard.url} has {size:,} bytes, not {shard.bytes:,}: copy or make it again"]
    try:
        text = read_bytes(index_url(shard.url))
        index = ShardIndex.from_json(text, index_url(shard.url))
    except FileNotFoundError:
        return [f"{shard.url} has no index: copy it too, or run `python -m data_prep index {shard.url}`"]
    except ConfigError as error:
        return [str(error)]
    if len(index) != shard.samples or index.bytes != size:
        return [f"{index_url(shard.url)} is not that of its shard: run `python -m data_prep index` on the folder"]
    digest.update(text)
    return []


def server(uri: str | None) -> dict[str, Any]:
    """Does the MLflow server answer? Nothing to ask without one (SQLite in the out dir)."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith("http"):
        return {"state": "off" if uri == "none" else "embedded"}
    try:
        parts = urlsplit(uri)
        address = parts.netloc.rpartition("@")[2]
        bare = urlunsplit(parts._replace(netloc=address, path=parts.path.rstrip("/") + "/health"))
        with urllib.request.urlopen(bare, timeout=5) as answer:
            return {"state": f"answers {answer.status}".removesuffix(" 200")}
    except (OSError, ValueError, http.client.HTTPException) as error:  # no address, no server, or one of another kind
        if getattr(error, "code", 500) < 500:  # it is there; what it lets in is for its owner to say
            return {"state": f"answers {error.code}"}
        reason = getattr(error, "reason", error)
        return {"error": f"no answer from {redact.text(uri)} ({reason}): start it, open its port, or set track.uri"}


def port_free(port: int) -> bool:
    """Can a job's first rank listen on ``port`` here?"""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def facts(cfg: config.RunConfig | None, port: int) -> dict[str, Any]:
    """Everything above; ``cfg`` (a run that is planned) adds its data, its out dir, its settings and its server."""
    out = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": packages(),
        "code": code(),
        "compiler": compiler(),
        "ninja": shutil.which("ninja") is not None or (Path(sys.executable).parent / "ninja").exists(),
        "cores": psutil.cpu_count(),
        "memory_gib": psutil.virtual_memory().total / 2**30,
        **(found := accelerators()),
        "experts": experts() if found["kind"] == "cpu" else "the device's",
        "interfaces": interfaces(),
        "port_free": port_free(port),
        "disk": disk(Path(cfg.out) if cfg else Path.cwd()),
        "tracking": server(cfg.track.uri if cfg else None),
    }
    if cfg is not None:
        out["config"] = settings(cfg)
        if cfg.data.train:
            out["data"] = data_set(cfg.data.train)
    return out


def whole(facts: Any) -> bool:
    """Whether ``facts`` are what ``facts()`` gives."""
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), kind) for key, kind in KINDS.items()):
        return False
    disk, server, data = facts["disk"], facts["tracking"], facts.get("data", {"samples": 0})
    return (
        ("error" in disk or {"folder", "free_gib", "write_mb_s"} <= disk.keys())
        and ("error" in server or "state" in server)
        and isinstance(data, dict)
        and ("error" in data or "samples" in data)
    )
