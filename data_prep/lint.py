"""``lint``: every image of shards read and checked, in parallel; a table, a JSON report, and ``--fix``."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from data_prep import parallel
from data_prep.checks import BAD, ERRORS, WARNINGS, Finding, ShardReport, check_shard
from data_prep.console import note, table
from data_prep.repair import repair
from moe_cl.arguments import whole
from moe_cl.config import ConfigError
from moe_cl.data.index import expand, is_remote, read_dataset, write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("pattern", help="brace pattern of tars, a folder of shards, or FOLDER/SPLIT")
    parser.add_argument("--report", metavar="FILE", help="where the JSON report goes (default: lint.json here)")
    parser.add_argument(
        "--max-pixels", type=whole(1), default=100_000_000, help="larger images are errors (default: 1e8)"
    )
    parser.add_argument("--decode", action="store_true", help="decode every image, not only those with a doubtful end")
    parser.add_argument("--workers", type=whole(1), default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--fix", action="store_true", help="write shards with bad samples again, without these")
    parser.add_argument("--drop-duplicates", action="store_true", help="with --fix: later copies of equal bytes go too")


def run(args: argparse.Namespace) -> int:
    """The verb: 1 if there are errors (with ``--fix``: if some are left)."""
    shards = shards_of(args.pattern)
    if args.fix and any(is_remote(url) for url, _ in shards):
        raise ConfigError("--fix writes local shards only; download them first")
    reports = _check_all(shards, args)
    counts, rows = _summary(reports)
    samples = sum(len(r.rows) for r in reports)
    tree: dict[str, Any] = {"pattern": args.pattern, "shards": len(reports), "samples": samples, "counts": counts}
    tree["findings"] = [{"shard": r.url, **f._asdict()} for r in reports for f in r.findings]
    errors = sum(n for kind, n in counts.items() if kind in ERRORS)
    if rows:
        table(("what", "", "count", "meaning", "first"), rows, title=f"{args.pattern}")
    print(f"{len(reports)} shards, {samples:,} samples, {errors} errors, {sum(counts.values()) - errors} warnings")
    if args.fix:
        drop = BAD | ({"duplicate_content", "duplicate_content_other_label"} if args.drop_duplicates else set())
        tree["fixed"] = repair(reports, drop)
        for line in tree["fixed"]:
            note(f"{line['shard']}: {line['kept']} samples kept, {line['dropped']} dropped")
        errors = counts.get("missing_shard", 0)  # all others went, or were made anew
    out = Path(args.report or "lint.json")
    write_atomic(out, json.dumps(tree, indent=1) + "\n")
    note(f"report: {out}")
    return 1 if errors else 0


def shards_of(pattern: str) -> list[tuple[str, str]]:
    """(url, sha256 or "") of a pattern's tars; unlike the loader, lint needs no index. Raises ConfigError."""
    if pattern.endswith(".tar") or (not is_remote(pattern) and any(c in pattern for c in "{*?[")):
        urls = expand(pattern)
        missing = [u for u in urls if not is_remote(u) and not os.path.exists(u)]
        if len(missing) == len(urls):
            raise ConfigError(f"{missing[0]} does not exist; check the shard pattern")
        return [(url, _hashes(os.path.dirname(url)).get(os.path.basename(url), "")) for url in urls]
    folder, split = pattern.rstrip("/"), None
    tree = read_dataset(folder)
    if tree is None and not os.path.isdir(folder):
        folder, _, split = folder.rpartition("/")
        tree = read_dataset(folder or ".")
    if tree is not None:
        if split and split not in tree["splits"]:
            raise ConfigError(f"{folder} has no split {split!r}; it has {', '.join(tree['splits'])}")
        chosen = [tree["splits"][split]] if split else tree["splits"].values()
        return [(f"{folder or '.'}/{s['file']}", s.get("sha256", "")) for entry in chosen for s in entry["shards"]]
    tars = sorted(str(p) for p in Path(pattern).glob("*.tar")) if Path(pattern).is_dir() else []
    if not tars:
        raise ConfigError(f"{pattern}: no shards there; give a brace pattern of tars or a folder of them")
    return [(path, "") for path in tars]


def _hashes(folder: str) -> dict[str, str]:
    splits = (read_dataset(folder or ".") or {"splits": {}})["splits"].values()
    return {s["file"]: s.get("sha256", "") for entry in splits for s in entry["shards"]}


def _check_all(shards: list[tuple[str, str]], args: argparse.Namespace) -> list[ShardReport]:
    found: dict[int, ShardReport] = {}
    shared = (shards, args.max_pixels, args.decode)
    for job, report in parallel.run(_check, shared, range(len(shards)), args.workers, "reading", len(shards), "shards"):
        found[job] = report
    reports = [found[i] for i in range(len(shards))]
    _compare(reports)
    return reports


def _check(shared: tuple[list[tuple[str, str]], int, bool], counter: Any, job: int) -> ShardReport:
    shards, max_pixels, decode = shared
    report = check_shard(*shards[job], max_pixels, decode)
    counter.add(1)
    return report


def _compare(reports: list[ShardReport]) -> None:
    """Findings that need more than one sample: labels, equal bytes, equal keys in two shards."""
    labelled = any(row.label >= 0 for report in reports for row in report.rows)
    first: dict[bytes, tuple[str, str, int]] = {}
    keys: dict[str, str] = {}
    for report in reports:
        for row in report.rows:
            if labelled and row.label < 0:
                report.findings.append(Finding("missing_label", row.key, "no cls, and no label in its json"))
            url, key, label = first.setdefault(row.digest, (report.url, row.key, row.label))
            if (url, key) != (report.url, row.key):
                kind = "duplicate_content" if label == row.label else "duplicate_content_other_label"
                report.findings.append(Finding(kind, row.key, f"as {key} in {os.path.basename(url)}"))
            # Keys count within one split: NAME-train-000000.tar and NAME-test-000000.tar may both begin at 0.
            where = keys.setdefault(f"{re.sub(r'[-_]?[0-9]*[.]tar$', '', report.url)} {row.key}", report.url)
            if where != report.url:
                report.findings.append(Finding("repeated_key", row.key, f"also in {os.path.basename(where)}"))


def _summary(reports: list[ShardReport]) -> tuple[dict[str, int], list[tuple]]:
    examples: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        for finding in report.findings:
            name = os.path.basename(report.url)
            examples[finding.kind].append(f"{name}: {finding.key} {finding.detail}".replace(":  ", ": "))
    known = ERRORS | WARNINGS
    counts = {kind: len(examples[kind]) for kind in known if kind in examples}
    rows = [
        (kind, "error" if kind in ERRORS else "warning", count, known[kind], examples[kind][0])
        for kind, count in counts.items()
    ]
    return counts, rows
