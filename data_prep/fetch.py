"""Named public sets, brought to one folder: from a folder the user has, from Debian's package, or by torchvision.

``fetch fashion-mnist`` works without the internet where Debian's mirror is in reach: its package
``dataset-fashion-mnist`` puts the four files under /usr/share/datasets/fashion-mnist. ``fetch openclipart`` makes a
small colour set of Debian's ``openclipart-png`` (see ``data_prep.clipart``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from data_prep import clipart
from data_prep.console import note
from data_prep.sources.arrays import digits_arrays, idx_files, read_idx, write_idx
from moe_cl.config import ConfigError

DEBIAN = {
    "fashion-mnist": ("dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist")),
    "openclipart": ("openclipart-png", Path("/usr/share/openclipart/png")),
}
TORCHVISION = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST"}
KNOWN = ("fashion-mnist", "mnist", "digits", "openclipart")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("name", help=f"{', '.join(KNOWN)}, or torchvision:NAME (CIFAR10, STL10, ...)")
    parser.add_argument("--from", dest="source", metavar="DIR", help="a folder that has the files already")
    parser.add_argument("--out", metavar="DIR", help="where the files go (default: data/raw/NAME)")


def default_folder(name: str) -> str:
    """Where ``fetch`` puts a set, and ``shard`` looks for it, when nobody says."""
    return f"data/raw/{name}"


def run(args: argparse.Namespace) -> int:
    """The verb. Prints the folder; raises ConfigError naming every way that was tried."""
    name = args.name
    if name.startswith("torchvision:"):
        return _torchvision_set(name, args.out or "data")
    if name not in KNOWN:
        raise ConfigError(f"unknown set {name!r}; fetch knows {', '.join(KNOWN)} and torchvision:NAME")
    out = Path(args.out or default_folder(name))
    if name == "openclipart":
        return _openclipart(Path(args.source) if args.source else None, out)
    if args.source is None and _complete(out):
        note(f"{out} has all files of {name}")
    elif name == "digits":
        out.mkdir(parents=True, exist_ok=True)
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images, labels = digits_arrays(split)
            write_idx(out / f"{prefix}-images-idx3-ubyte.gz", images)
            write_idx(out / f"{prefix}-labels-idx1-ubyte.gz", labels)
        note(f"digits: scikit-learn's bundled images, written to {out}")
    else:
        _first_that_works(name, Path(args.source) if args.source else None, out)
    print(out)
    note(f"next: python -m data_prep shard {name}:{out} --out DIR --split train")
    return 0


def _openclipart(source: Path | None, out: Path) -> int:
    """From the package's folder, or from one like it."""
    package, folder = DEBIAN["openclipart"]
    reason = _install(package, folder) if source is None else None
    if reason:
        raise ConfigError(f"openclipart: Debian's package {package}: {reason}; or name its png folder with --from")
    folder = source or folder
    if not folder.is_dir():
        raise ConfigError(f"openclipart: {folder} does not exist; --from names the folder with one folder a class")
    note(f"openclipart: {clipart.write(folder, out)}")
    print(out)
    note(f"next: python -m data_prep shard {out} --out DIR --split train")
    return 0


def _first_that_works(name: str, source: Path | None, out: Path) -> None:
    ways: list[tuple[str, Callable[[], str | None]]] = [
        (f"a folder of yours (--from {source or 'DIR'})", lambda: _copy(source, out) if source else "none was given")
    ]
    if name in DEBIAN:
        package, folder = DEBIAN[name]
        ways.append((f"Debian's package {package} ({folder})", lambda: _debian(package, folder, out)))
    ways.append((f"torchvision's download of {TORCHVISION[name]}", lambda: _download(TORCHVISION[name], out)))
    reasons = []
    for way, attempt in ways:
        reason = attempt()
        if reason is None:
            note(f"{name}: from {way}")
            return
        if source:  # a folder that was named and does not do is an error, not a reason to take another one
            others = " and ".join(other for other, _ in ways[1:])
            raise ConfigError(f"{name}: {way}: {reason}; without --from the ways are {others}")
        reasons.append(f"{way}: {reason}")
    raise ConfigError(f"{name}: no way to its files worked: {'; '.join(reasons)}")


def _complete(folder: Path) -> bool:
    return all(idx_files(folder, split) for split in ("train", "test"))


def _copy(folder: Path, out: Path) -> str | None:
    """Copy the four files, each read once as a check; the reason why not."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    if not _complete(folder):
        return f"{folder} lacks some of the four IDX files"
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        for file in idx_files(folder, split):
            read_idx(file)
            if file.resolve() != (out / file.name).resolve():
                part = out / (file.name + ".part")
                shutil.copyfile(file, part)
                os.replace(part, out / file.name)
    return None


def _debian(package: str, folder: Path, out: Path) -> str | None:
    return _install(package, folder) or _copy(folder, out)


def _install(package: str, folder: Path) -> str | None:
    """Have Debian's package, which brings ``folder``; the reason why not."""
    if folder.is_dir():
        return None
    apt = shutil.which("apt-get")
    if apt is None:
        return "not installed, and this is no Debian"
    if os.geteuid() != 0:
        return f"not installed, and installing it needs root (sudo apt-get install {package})"
    note(f"installing {package}")
    command = [apt, "install", "-y", "--no-install-recommends", package]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for attempt in ([], [[apt, "update"]]):  # package lists may be missing or old
        for extra in attempt:
            subprocess.run(extra, env=environment, capture_output=True, check=False)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
    return f"apt-get failed ({' '.join(done.stderr.split())[-160:]})"


def _download(kind: str, out: Path) -> str | None:
    from data_prep.sources.torchvision_sets import torchvision_dataset

    try:
        torchvision_dataset(kind, str(out), "train", download=True)
    except ConfigError as error:
        return str(error)
    return _copy(out / kind / "raw", out)


def _torchvision_set(name: str, root: str) -> int:
    """Any other set of torchvision: its own files, below ``root``."""
    from data_prep.sources.torchvision_sets import torchvision_dataset

    torchvision_dataset(name.partition(":")[2], root, "train", download=True)
    print(root)
    note(f"next: python -m data_prep shard {name} --root {root} --out DIR --split train")
    return 0
