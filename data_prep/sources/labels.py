"""Ground-truth lists: which class an image of a flat folder or tar belongs to.

Forms that are around for ImageNet's validation images, told apart by their first line:

    ILSVRC2012_val_00000001.JPEG 65            name and class number (Caffe's val.txt)
    ILSVRC2012_val_00000001.JPEG n01751748     name and synset
    n01751748                                  a synset a line, in the order of the images
    490                                        an ILSVRC2012_ID a line (the devkit's list): needs the devkit

Class numbers are those of the sorted synsets, as the training tar gives them. An ILSVRC2012_ID is another numbering,
and only the devkit's meta.mat translates it.
"""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from moe_cl.config import ConfigError

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Labels:
    """Labels by name, or by the number at the end of the name (``ordered``: image 1 has the first)."""

    where: str
    class_names: tuple[str, ...]
    by_name: dict[str, int]
    ordered: tuple[int, ...]

    def of(self, name: str) -> int:
        """The class number of an image. Raises ConfigError if the list does not have it."""
        base = name.rsplit("/", 1)[-1]
        if self.by_name:
            for key in (name, base):
                if key in self.by_name:
                    return self.by_name[key]
        else:
            digits = re.search(r"(\d+)\.[^.]+$", base)
            if digits and 1 <= int(digits.group(1)) <= len(self.ordered):
                return self.ordered[int(digits.group(1)) - 1]
        raise ConfigError(f"{self.where} has no label for {name}; give the list that belongs to these images")


def read_labels(path: str | None, devkit: str | None) -> Labels:
    """Reads a list, a devkit (its own list is used when ``path`` is None), or both. Raises ConfigError."""
    kit = read_devkit(devkit) if devkit else None
    if path is None:
        if kit is None:
            raise ConfigError("no labels: give --labels LIST or --devkit ILSVRC2012_devkit_t12.tar.gz")
        where, text = devkit, kit.ground_truth
    else:
        where = path
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"--labels {path}: no readable text file") from None
    rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    if not rows or any(len(row) != len(rows[0]) for row in rows) or len(rows[0]) not in (1, 2):
        raise ConfigError(f"{where}: expected one label a line, or a name and a label")
    values = [row[-1] for row in rows]
    numbers = all(v.isdigit() for v in values)
    if numbers and len(rows[0]) == 1:
        if kit is None:
            raise ConfigError(
                f"{where}: numbers alone are ILSVRC2012_IDs; give --devkit too, whose meta.mat names them"
            )
        values, numbers = [kit.synset(int(v), where) for v in values], False
    names = kit.class_names if kit else tuple(sorted(set(values))) if not numbers else ()
    number_of = {name: i for i, name in enumerate(names)}
    try:
        labels = [int(v) if numbers else number_of[v] for v in values]
    except KeyError as error:
        raise ConfigError(f"{where}: {error} is no synset of the devkit") from None
    by_name = {row[0]: label for row, label in zip(rows, labels, strict=True)} if len(rows[0]) == 2 else {}
    return Labels(str(where), names, by_name, tuple(labels))


@dataclass(frozen=True)
class Devkit:
    """Leaf synsets of meta.mat by ILSVRC2012_ID, and the ground-truth list's text."""

    synsets: dict[int, str]
    ground_truth: str

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(sorted(self.synsets.values()))

    def synset(self, number: int, where: str) -> str:
        if number not in self.synsets:
            raise ConfigError(f"{where}: {number} is no ILSVRC2012_ID of the devkit")
        return self.synsets[number]


def read_devkit(path: str) -> Devkit:
    """``meta.mat`` and the ground truth from a devkit archive or its unpacked folder. Raises ConfigError."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    files: dict[str, bytes] = {}
    wanted = ("meta.mat", GROUND_TRUTH)
    try:
        if Path(path).is_dir():
            files = {p.name: p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.name in wanted}
        else:
            with tarfile.open(path) as tar:
                for member in tar:
                    name = member.name.rsplit("/", 1)[-1]
                    if member.isreg() and name in wanted:
                        files[name] = tar.extractfile(member).read()
    except (OSError, tarfile.TarError):
        raise ConfigError(f"--devkit {path}: no devkit archive or folder") from None
    if set(files) != set(wanted):
        raise ConfigError(f"--devkit {path}: {' and '.join(sorted(set(wanted) - set(files)))} not in it")
    try:
        table = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        leaves = table[table["num_children"] == 0]
        synsets = {int(i): str(w) for i, w in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
    except (MatReadError, ValueError, KeyError, IndexError, TypeError):
        raise ConfigError(f"--devkit {path}: meta.mat has no table of synsets") from None
    return Devkit(synsets, files[GROUND_TRUTH].decode())
