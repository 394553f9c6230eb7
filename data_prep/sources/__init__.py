"""Where images come from. ``open_source`` tells the kinds apart by what the user wrote and by what lies there."""

from __future__ import annotations

from pathlib import Path

from data_prep.sources.base import Item, Reader, Sample, Source, SourceOptions
from moe_cl.config import ConfigError

__all__ = ["Item", "Reader", "Sample", "Source", "SourceOptions", "open_source"]
KINDS = "an image folder, a tar, a .csv or .tsv, torchvision:NAME, fashion-mnist:DIR, mnist:DIR, digits, or shards"


def open_source(text: str, options: SourceOptions) -> Source:
    """The source that ``text`` names. Raises ConfigError with what it could be."""
    from data_prep.sources import arrays

    kind, colon, rest = text.partition(":")
    if colon and kind == "torchvision":
        from data_prep.sources.torchvision_sets import open_torchvision

        return open_torchvision(rest, text, options)
    if kind in ("fashion-mnist", "mnist") and not Path(text).exists():
        from data_prep.fetch import default_folder

        return arrays.open_idx(kind, Path(rest or default_folder(kind)), text, options)
    if kind == "digits" and not Path(text).exists():
        return arrays.open_idx(kind, Path(rest), text, options) if rest else arrays.open_digits(text, options)
    path = Path(text)
    if path.is_dir():
        from data_prep.sources.folder import open_folder

        if (path / "dataset.json").is_file() or (
            any(path.glob("*.tar")) and not any(p.is_dir() for p in path.iterdir())
        ):
            return _shards(text)
        return open_folder(path, text, options)
    if path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        from data_prep.sources.table import open_table

        return open_table(path, text, options)
    if path.suffix == ".tar" and path.is_file():
        from data_prep.sources.tars import open_tar

        return open_tar(path, text, options) or _shards(text)
    if text.endswith(".tar") and any(c in text for c in "{*?[") or (path.parent / "dataset.json").is_file():
        return _shards(text)
    if path.exists():
        raise ConfigError(f"{text}: no source that is known; give {KINDS}")
    raise ConfigError(f"{text} does not exist; give {KINDS}")


def _shards(text: str) -> Source:
    from data_prep.sources.tars import open_shards

    return open_shards(text, text)
