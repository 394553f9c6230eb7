"""Views of real photographs: the fast implementation and the papers' pipeline in turn, on one core.

Both sides start from the same 500 x 375 JPEGs and give normalised float32 tensors: ``reference`` decodes with Pillow
and augments with torchvision, ``fast`` is what the loader does. Processor time of this process is counted, so that
other work on the machine disturbs less; rounds of all photos alternate, and the medians of the rounds are compared.
"""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
import time

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from moe_cl.config import ViewsConfig
from moe_cl.data.decode import decode
from moe_cl.views import augment, device, reference
from moe_cl.views.spec import build_spec, collate

SPECS = {"views_mocov3": "mocov3", "views_esvit": "esvit"}
TARGET = 4.0


def photographs() -> list[bytes]:
    """Sixteen 500 x 375 JPEGs: four cuts and their mirror images of each of scikit-learn's two photographs."""
    out = []
    for image in map(Image.fromarray, load_sample_images().images):  # 640 x 427
        for box in ((0, 0, 569, 427), (71, 0, 640, 427), (40, 20, 540, 395), (100, 40, 600, 415)):
            cut = image.crop(box).resize((500, 375), Image.Resampling.LANCZOS)
            for version in (cut, cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
                stream = io.BytesIO()
                version.save(stream, "JPEG", quality=92)
                out.append(stream.getvalue())
    return out


def seconds(make, items, first: int) -> float:
    """Processor seconds of ``make(item, position)`` over the items."""
    start = time.process_time()
    for position, item in enumerate(items, first):
        make(item, position)
    return time.process_time() - start


def compare(sides: dict, inputs: dict, rounds: int) -> dict[str, float]:
    """Milliseconds an item of each side (median of rounds, sides in turn in each round)."""
    for name, make in sides.items():
        seconds(make, inputs[name], 0)
    times = {name: [] for name in sides}
    for i in range(rounds):
        for name, make in sides.items():
            times[name].append(seconds(make, inputs[name], i * 100) / len(inputs[name]) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios reference/fast, from JPEG bytes (``views_*``) and from decoded images (``views_only_*``), and targets."""
    torch.set_num_threads(1)
    jpegs = photographs()[:: 4 if quick else 1]
    ratios, targets = {}, {}
    for name, spec_name in SPECS.items():
        spec = build_spec(ViewsConfig(spec=spec_name))

        def fast(data, position, spec=spec):
            return augment.make_views(decode(data), spec, 0, 0, position)

        def slow(data, position, spec=spec):
            return reference.make_views(Image.open(io.BytesIO(data)).convert("RGB"), spec, 0, 0, position)

        def fast_only(image, position, spec=spec):
            return augment.make_views(image, spec, 0, 0, position)

        def slow_only(image, position, spec=spec):
            return reference.make_views(image, spec, 0, 0, position)

        arrays = [decode(data) for data in jpegs]
        images = [Image.fromarray(a) for a in arrays]
        for key, sides, inputs in (
            (name, {"reference": slow, "fast": fast}, {"reference": jpegs, "fast": jpegs}),
            (
                name.replace("views", "views_only"),
                {"reference": slow_only, "fast": fast_only},
                {"reference": images, "fast": arrays},
            ),
        ):
            ms = compare(sides, inputs, 3 if quick else 9)
            ratios[key], targets[key] = ms["reference"] / ms["fast"], TARGET
            print(f"{key:20s} reference {ms['reference']:7.2f} ms  fast {ms['fast']:6.2f} ms  ratio {ratios[key]:.2f}")
    _report_others(arrays, quick)
    return ratios, targets


def _report_others(arrays: list[np.ndarray], quick: bool) -> None:
    """Figures without a target: small gray images, and the batched implementation on the CPU."""
    small = [np.repeat(np.ascontiguousarray(a[100:128, 100:128, :1]), 3, axis=2) for a in arrays] * 20
    overrides = {"hue": 0, "saturation": 0, "gray": 0, "blur": 0}
    for label, spec in (
        ("28 px, MoCo v3", build_spec(ViewsConfig(size=28))),
        ("28 px, no hue, saturation, blur", build_spec(ViewsConfig(size=28, overrides=overrides))),
    ):

        def two_views(image, position, spec=spec):
            return augment.make_views(image, spec, 0, 0, position)

        ms = compare({"fast": two_views}, {"fast": small}, 3 if quick else 9)["fast"]
        print(f"two views, {label}: {ms:.3f} ms")
    spec = dataclasses.replace(build_spec(ViewsConfig()), implementation="device")
    crops = [augment.make_views(a, spec, 0, 0, p) for p, a in enumerate(arrays)]
    batch, positions = collate(crops)[0], torch.arange(len(arrays))

    def finish(_, position):
        return device.finish(batch, spec, 0, 0, positions + position)

    cropping = compare({"crop": lambda a, p: augment.make_views(a, spec, 0, 0, p)}, {"crop": arrays}, 3)["crop"]
    finishing = compare({"finish": finish}, {"finish": [None]}, 2 if quick else 5)["finish"] / len(arrays)
    print(
        f"device, MoCo v3: {cropping:.2f} ms to crop, {finishing:.2f} ms an image to finish the batch on one CPU core"
    )


def main() -> None:
    """Print the figures and, last, one JSON line."""
    import sys

    ratios, targets = measure("--quick" in sys.argv)
    met = all(ratios[name] >= target for name, target in targets.items())
    rounded = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps({"benchmark": "_views", "ratios": rounded, "targets": targets, "met": met}))


if __name__ == "__main__":
    main()
