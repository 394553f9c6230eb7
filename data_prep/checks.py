"""Everything that can be wrong with one shard, found by reading all of it once."""

from __future__ import annotations

import hashlib
import io
import tarfile
import warnings
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import simplejpeg
from PIL import Image

from moe_cl.config import ConfigError
from moe_cl.data.header import EXTENSIONS, FORMATS, BadImage, Header, probe, reason
from moe_cl.data.index import UNSAFE_MEMBER, ZERO_LENGTH, BrokenTar, index_url, load_index, open_file, scan
from moe_cl.data.scan import is_unsafe, label_of, split_member, walk

ERRORS = {
    "missing_shard": "the tar is not there",
    "truncated_tar": "the tar ends too early or is none",
    "wrong_hash": "the tar is not the one that dataset.json describes",
    "wrong_index": "the index beside the tar does not describe it",
    ZERO_LENGTH: "an image without bytes",
    UNSAFE_MEMBER: "a link, a device, or a path with ..",
    "corrupt_image": "no reader takes it",
    "truncated_image": "the image's data end too early",
    "too_many_pixels": "a decompression bomb, or larger than --max-pixels",
    "missing_label": "no label, though others have one",
    "duplicate_key": "the same key twice in a shard",
}
WARNINGS = {
    "wrong_extension": "the bytes are of another format than the name says",
    "cmyk": "four colour channels; the loader converts them as Pillow does",
    "duplicate_content": "the same bytes twice",
    "duplicate_content_other_label": "the same bytes under two labels",
    "key_order": "keys do not ascend",
    "no_image": "a sample without an image member",
    "unreadable_label": "a cls member that is no whole number",
    "repeated_key": "the same key in two shards",
    "no_index": "no index beside the tar; `python -m data_prep index` builds it",
}
BAD = frozenset(ERRORS) - {"missing_shard", "truncated_tar", "wrong_hash", "wrong_index"}  # --fix drops such samples
FORMAT_OF = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
FORMAT_OF |= {"tiff": "TIFF", "ppm": "PPM", "pgm": "PPM"}


class Finding(NamedTuple):
    """One thing wrong: with a sample, or (key "") with the shard."""

    kind: str
    key: str
    detail: str


class Row(NamedTuple):
    """What the comparison between shards needs of a sample."""

    key: str
    label: int
    digest: bytes


@dataclass
class ShardReport:
    """Findings of one shard, its samples' digests, the span of members to keep."""

    url: str
    findings: list[Finding] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


@dataclass
class _Group:
    key: str
    members: list[tuple[str, tarfile.TarInfo]] = field(default_factory=list)


def check_shard(url: str, sha256: str, max_pixels: int, decode: bool) -> ShardReport:
    """Reads a shard and every image in it.

    Args:
        sha256: of the tar as dataset.json has it; empty skips that comparison.
        max_pixels: larger images are findings.
        decode: decode every image, not only those whose end looks wrong.
    """
    report = ShardReport(url)
    try:
        with open_file(url) as stream:
            _check_hash(stream, sha256, report)
            stream.seek(0)
            _check_members(stream, report, max_pixels, decode)
        _check_index(report)
    except FileNotFoundError:
        report.findings.append(Finding("missing_shard", "", "the file does not exist"))
    return report


def _check_hash(stream: BinaryIO, sha256: str, report: ShardReport) -> None:
    if sha256:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            report.findings.append(Finding("wrong_hash", "", f"sha256 {found[:12]}, expected {sha256[:12]}"))


def _check_members(stream: BinaryIO, report: ShardReport, max_pixels: int, decode: bool) -> None:
    seen: set[str] = set()
    group = _Group("")
    length = stream.seek(0, io.SEEK_END)
    stream.seek(0)

    def close() -> None:
        if group.key:
            _check_group(stream, group, report, max_pixels, decode)

    try:
        for member in walk(stream, report.url):
            parts = None if member.isdir() else split_member(member.name)
            if parts is None:
                continue
            if parts[0] != group.key:
                close()
                if parts[0] in seen:
                    report.findings.append(Finding("duplicate_key", parts[0], "its members are not side by side"))
                elif group.key and parts[0] < group.key:
                    report.findings.append(Finding("key_order", parts[0], f"after {group.key}"))
                seen.add(parts[0])
                group = _Group(parts[0])
            elif parts[1] in (e for e, _ in group.members):
                report.findings.append(Finding("duplicate_key", parts[0], f"two members .{parts[1]}"))
            group.members.append((parts[1], member))
    except BrokenTar as error:
        report.findings.append(Finding("truncated_tar", "", str(error).removeprefix(f"{report.url}: ")))
        if any(m.offset_data + m.size > length for _, m in group.members):
            return
    close()


def _check_group(stream: BinaryIO, group: _Group, report: ShardReport, max_pixels: int, decode: bool) -> None:
    def find(kind: str, detail: str) -> None:
        report.findings.append(Finding(kind, group.key, detail))

    unsafe = [m.name for _, m in group.members if is_unsafe(m)]
    if unsafe:
        return find(UNSAFE_MEMBER, unsafe[0])
    found = next(((e, m) for e, m in group.members if e.rsplit(".", 1)[-1] in EXTENSIONS), None)
    if found is None:
        return find("no_image", ", ".join(e for e, _ in group.members))
    data = _read(stream, found[1])
    if not data:
        return find(ZERO_LENGTH, found[1].name)
    label = -1
    for ext, m in group.members:
        if ext in ("cls", "json"):
            value = label_of(ext, _read(stream, m))
            if ext == "cls" and value == -1:
                find("unreadable_label", repr(_read(stream, m)[:20]))
            label = value if ext == "cls" or label == -1 else label
    report.rows.append(Row(group.key, label, hashlib.sha256(data).digest()[:16]))
    for kind, detail in check_image(data, found[0].rsplit(".", 1)[-1], max_pixels, decode):
        find(kind, detail)


def check_image(data: bytes, ext: str, max_pixels: int, decode: bool) -> list[tuple[str, str]]:
    """(kind, detail) of what is wrong with an image's bytes."""
    try:
        header = probe(data)
    except BadImage as error:
        return [("corrupt_image", str(error))]
    out = []
    if FORMAT_OF.get(ext) != header.format:
        out.append(("wrong_extension", f"{header.format} named .{ext}"))
    if header.mode == "CMYK":
        out.append(("cmyk", f"{header.width} x {header.height}"))
    if header.width * header.height > max_pixels:
        out.append(("too_many_pixels", f"{header.width} x {header.height}"))
    elif decode or not _ends_well(data, header):
        why = _decode_error(data, header)
        if why:
            out.append(("truncated_image" if "truncated" in why else "corrupt_image", why))
    return out


def _ends_well(data: bytes, header: Header) -> bool:
    """Whether the format's end mark is there; bytes may follow it. Formats without one are decoded to know."""
    if header.format == "JPEG":
        return b"\xff\xd9" in data[-64:]
    return header.format == "PNG" and data.endswith(b"IEND\xaeB`\x82")


def _decode_error(data: bytes, header: Header) -> str:
    if header.format == "JPEG" and header.mode in ("RGB", "L"):
        # libjpeg fills missing rows with gray and only warns; Pillow hides the warning when an end mark is there.
        try:
            simplejpeg.decode_jpeg(data, strict=True)
        except ValueError as error:
            if "premature" in str(error).lower():
                return f"truncated: {reason(error)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(data), formats=FORMATS).load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        return reason(error)
    return ""


def _check_index(report: ShardReport) -> None:
    """The index that lies beside the shard against one made now."""
    if any(f.kind == "truncated_tar" for f in report.findings):
        return
    try:
        index = load_index(report.url)
    except ConfigError as error:
        kind = "no_index" if "has no index" in str(error) else "wrong_index"
        report.findings.append(Finding(kind, "", index_url(report.url)))
        return
    now = scan(report.url)
    pairs = (
        (index.keys, now.keys),
        *((getattr(index, c).tolist(), getattr(now, c).tolist()) for c in ("offset", "size")),
    )
    if any(a != b for a, b in pairs) or (index.bytes and index.bytes != now.bytes):
        report.findings.append(Finding("wrong_index", "", f"{len(index)} rows, the tar has {len(now)}"))


def _read(stream: BinaryIO, member: tarfile.TarInfo) -> Any:
    stream.seek(member.offset_data)
    return stream.read(member.size)
