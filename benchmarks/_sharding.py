"""The sharder beside GNU tar, beside itself with one worker, and beside a plain loop of Pillow and webdataset.

All sides take the same files from a warm cache and write to the same disk. A process without torch measures, as the
sharder's command is one; its start is not counted on any side. Rounds alternate, the medians of their ratios count.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TARGETS = {"shard_vs_gnu_tar": 0.5, "shard_resize_2_workers_vs_1": 1.8, "shard_resize_vs_pil_and_shardwriter": 2.0}


def measure(quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios of the sharder's speed, and what they should reach. Raises RuntimeError with the child's last line."""
    command = [sys.executable, "-m", "benchmarks._sharding", "quick" if quick else "full"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"sharding benchmark: {done.stderr.strip().splitlines()[-1]}")
    print(done.stderr, end="")
    return json.loads(done.stdout.splitlines()[-1]), TARGETS


def photographs(folder: Path, count: int) -> None:
    """``count`` different JPEGs of 500 x 375, 118 kB on average: cuts of scikit-learn's two photographs."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(image) for image in load_sample_images().images]  # 640 x 427
    rng = np.random.default_rng(0)
    for i in range(count):
        left, top = int(rng.integers(0, 141)), int(rng.integers(0, 53))
        cut = originals[i % 2].crop((left, top, left + 500, top + 375))
        out = folder / f"class{i % 10}" / f"{i:05d}.JPEG"
        out.parent.mkdir(exist_ok=True, parents=True)
        cut.save(out, "JPEG", quality=99 if i % 8 < 2 else 98)  # 138 kB and 111 kB


def main(quick: bool) -> None:
    """Measures; the last line of stdout is the ratios as JSON, the figures go to stderr."""
    import cv2  # noqa: F401 - imported before anything is timed
    import simplejpeg  # noqa: F401

    # Re-encoding: an even number of equal shards, or two workers could not be twice as fast as one.
    count, small, rounds, each = (2500, 160, 3, 20) if quick else (2500, 600, 7, 30)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder / "all", count)
        photographs(folder / "some", small)
        files = sorted((folder / "all").rglob("*.JPEG"))
        size = sum(f.stat().st_size for f in files) / len(files)
        out = folder / "out"
        sides = {
            "tar": lambda: tar(folder / "all", out),
            "ours": lambda: ours(folder / "all", out, 2, 250),
            "resize_1": lambda: ours(folder / "some", out, 1, each, resize=256),
            "resize_2": lambda: ours(folder / "some", out, 2, each, resize=256),
            "loop": None,  # in its own process
        }
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        with looping_process(folder / "some", out, each) as loop:
            for _ in range(rounds):
                for side, run in sides.items():
                    shutil.rmtree(out, ignore_errors=True)
                    out.mkdir()
                    times[side].append(timed(run) if run else loop())
    report(times, f"{count} files of {size / 1e3:.0f} kB, {small} of them for resize and loop")


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """(wall seconds, processor seconds of this process and its children)."""
    used, start = os.times(), time.perf_counter()
    run()
    wall, now = time.perf_counter() - start, os.times()
    return wall, sum(now[:4]) - sum(used[:4])


@contextlib.contextmanager
def looping_process(source: Path, out: Path, count: int) -> Iterator[Callable[[], tuple[float, float]]]:
    """Runs the loop in a process of its own: it imports webdataset and with it torch, which our side must not have."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()

    def serve() -> None:
        import webdataset  # noqa: F401 - not counted

        while theirs.recv():
            theirs.send(timed(lambda: plain_loop(source, out, count)))

    process = context.Process(target=serve)
    process.start()

    def loop() -> tuple[float, float]:
        mine.send(True)
        return mine.recv()

    yield loop
    mine.send(False)
    process.join()


def report(times: dict[str, list[tuple[float, float]]], what: str) -> None:
    """Ratios within each round, then the median: wall time where processes run side by side, else processor time."""
    pairs = (("tar", "ours", 0), ("resize_1", "resize_2", 0), ("loop", "resize_1", 1))
    ratios = [
        statistics.median(x[clock] / y[clock] for x, y in zip(times[a], times[b], strict=True)) for a, b, clock in pairs
    ]
    for side, values in times.items():
        wall, processor = (statistics.median(v) for v in zip(*values, strict=True))
        print(f"{side:9s} {wall:7.3f} s, processor {processor:7.3f} s", file=sys.stderr)
    print(what, file=sys.stderr)
    print(json.dumps(dict(zip(TARGETS, (round(r, 3) for r in ratios), strict=True))))


def tar(source: Path, out: Path) -> None:
    subprocess.run(["tar", "cf", str(out / "all.tar"), "-C", str(source), "."], check=True)


def ours(source: Path, out: Path, workers: int, count: int, resize: int | None = None) -> None:
    from data_prep.plan import Settings, make_plan
    from data_prep.shard import write_shards
    from data_prep.sources import SourceOptions, open_source

    images = open_source(str(source), SourceOptions())
    settings = Settings("x", "train", max_count=count, resize_shorter=resize)
    with contextlib.redirect_stdout(io.StringIO()):
        write_shards(images, make_plan(images.items, settings), out, workers)


def plain_loop(source: Path, out: Path, count: int) -> None:
    """What people write: Pillow's decode, resize and encode, webdataset's writer, one process."""
    import webdataset
    from PIL import Image

    with webdataset.ShardWriter(str(out / "x-%06d.tar"), maxcount=count, verbose=0) as writer:
        for i, path in enumerate(sorted(source.rglob("*.JPEG"))):
            image = Image.open(path).convert("RGB")
            scale = 256 / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
            data = io.BytesIO()
            image.save(data, "JPEG", quality=90)
            writer.write({"__key__": f"{i:09d}", "jpg": data.getvalue(), "cls": i % 10, "json": {"name": path.name}})


if __name__ == "__main__":
    main(sys.argv[1:] == ["quick"])
