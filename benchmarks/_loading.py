"""The loader itself: decoders of a photograph, throughput beside the usual pipeline, memory, restart.

The usual pipeline is webdataset's loader with Pillow and torchvision (``views.reference``), in one process like ours.
Both sides take turns; what is compared is the processor time of their processes, medians of the rounds.
"""

from __future__ import annotations

import io
import itertools
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import psutil
import torch
import webdataset
from PIL import Image

from benchmarks._views import photographs
from moe_cl.config import DataConfig, ViewsConfig
from moe_cl.data.decode import decode
from moe_cl.data.index import save, scan
from moe_cl.data.loader import Loader
from moe_cl.views import reference
from moe_cl.views.spec import build_spec

TARGETS = {"memory_early_to_late": 0.95}


def shards(folder: Path, samples: int, per_shard: int = 500) -> str:
    """Shards of 500 x 375 photographs; returns their pattern."""
    photos = photographs()
    for number, start in enumerate(range(0, samples, per_shard)):
        path = folder / f"photos-train-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(start, start + per_shard):
                for ext, data in (("jpg", photos[i % len(photos)]), ("cls", str(i % 10).encode())):
                    info = tarfile.TarInfo(f"{i:06d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        save(scan(str(path)), path)
    return f"{folder}/photos-train-{{000000..{number:06d}}}.tar"


def decoders(quick: bool) -> dict[str, float]:
    """Milliseconds a photograph by decoder, in turn; and half as large."""
    photos = photographs()
    times: dict[str, list[float]] = {}
    for _ in range(3 if quick else 15):
        for name, options in {
            "simplejpeg": {},
            "opencv": {"decoder": "opencv"},
            "torchvision": {"decoder": "torchvision"},
            "pil": {"decoder": "pil"},
            "simplejpeg, half size": {"shorter": 187},
            "pil, half size": {"decoder": "pil", "shorter": 187},
        }.items():
            start = time.process_time()
            for data in photos:
                decode(data, **options)
            times.setdefault(name, []).append((time.process_time() - start) / len(photos) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _ours(pattern: str, workers: int):
    cfg = DataConfig(train=pattern, workers=workers, streams=16)
    return Loader(cfg, build_spec(ViewsConfig()), seed=0, global_batch=64, micro_batch=64)


class _Views:
    def __init__(self):
        self.spec = build_spec(ViewsConfig(implementation="reference"))

    def __call__(self, image: Image.Image):
        return reference.make_views(image, self.spec, 0, 0, 0)


def _usual(pattern: str, workers: int):
    data = webdataset.WebDataset(pattern, shardshuffle=100, empty_check=False).shuffle(1000).decode("pilrgb")
    data = data.to_tuple("jpg").map_tuple(_Views()).batched(64, collation_fn=_stack).repeat()
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context="fork")
    return loader


def _stack(samples):
    return [torch.stack([s[0][0][v] for s in samples]) for v in range(2)]


def throughput(pattern: str, quick: bool) -> dict[str, float]:
    """Images a second of a worker's processor time, both loaders in turn."""
    steps, rounds = (4, 1) if quick else (10, 5)
    ours, usual = _ours(pattern, 1), iter(_usual(pattern, 1))
    workers = {"loader": ours._made._workers[0].pid, "webdataset": usual._workers[0].pid}
    rates: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, source in (("loader", ours), ("webdataset", usual)):
            for _ in range(6):  # what was prefetched while the other side ran does not count
                next(source)
            start = sum(psutil.Process(workers[name]).cpu_times()[:2])
            for _ in range(steps):
                next(source)
            rates[name].append(64 * steps / (sum(psutil.Process(workers[name]).cpu_times()[:2]) - start))
    ours.close()
    return {name: statistics.median(values) for name, values in rates.items()}


def memory(pattern: str, samples: int) -> tuple[float, float]:
    """MiB of its own that the worker holds: the most in the first half and in the second half of ``samples``."""
    cfg = DataConfig(train=pattern, workers=1, streams=16)
    source = Loader(cfg, build_spec(ViewsConfig(size=32)), seed=0, global_batch=100, micro_batch=100)
    held = []
    for step in itertools.count(1):
        next(source)
        source.used()
        if step == 1:
            (worker,) = (psutil.Process(w.pid) for w in source._made._workers)
        if step % 5 == 0 and step * 100 > samples // 10:
            held.append(worker.memory_full_info().uss / 2**20)
        if step * 100 >= samples:
            break
    source.close()
    return max(held[: len(held) // 2]), max(held[len(held) // 2 :])


def restart(pattern: str) -> tuple[float, float]:
    """Seconds to the first batch of an epoch, and to the first one after a restart near its end."""
    out = []
    for share in (0.0, 0.9):
        start = time.perf_counter()
        source = _ours(pattern, 0)
        state = source.state_dict()
        state["cursor"] = int(share * source.steps_per_epoch) * 64
        source.load_state_dict(state)
        next(source)
        out.append(time.perf_counter() - start)
    return out[0], out[1]


def measure(quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios of this part and their targets."""
    for name, ms in decoders(quick).items():
        print(f"decode 500 x 375, {name}: {ms:.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        pattern = shards(Path(folder), 2000)
        rates = throughput(pattern, quick)
        print(
            f"one worker, MoCo v3's two views of 500 x 375: loader {rates['loader']:.0f} images a core-second, "
            f"webdataset with Pillow and torchvision {rates['webdataset']:.0f}"
        )
        first, later = restart(pattern)
        print(f"first batch of an epoch {first:.2f} s, after a restart at nine tenths of it {later:.2f} s")
        samples = 2000 if quick else 20_000
        early, late = memory(pattern, samples)
        print(
            f"memory of a worker over {samples:,} samples: {early:.0f} MiB in the first half, {late:.0f} in the second"
        )
    ratios = {
        "loader_to_webdataset": rates["loader"] / rates["webdataset"],
        "memory_early_to_late": early / late,
    }
    return ratios, dict(TARGETS)
