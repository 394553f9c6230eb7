"""What a device and its links do: published figures of GPUs, or a file that ``plan --calibrate`` measured.

A data sheet gives peaks; what a training step reaches of them is assumed here, the same for every card:

- matrix products, convolutions: 0.5 of the dense peak. Narayanan et al. 2021 (arXiv:2104.04473, table 1) train
  transformers at 44 to 52 % of an A100's peak, everything included; Dao 2023 (arXiv:2307.08691) counts 50 to 73 % for
  fused attention at long sequences on it, so ``batched`` products and attention of short ones get 0.35.
- memory: 0.8 of the bandwidth (large copies reach about 0.9, small and strided operations less).
- links: 0.7 of one direction (a copy between two H100 reaches 380 of its 450 GB/s, NVIDIA/nccl issue 1264;
  collectives reach less), network: 0.8 of the line rate, 400 Gbit/s a node unless ``--network`` says otherwise.
- 5 us for an operation whose work is less (launch), 20 us for a collective, once a doubling of the ranks.

They are assumptions: measure the cluster's own device with ``plan --calibrate`` and plan with that file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_cl.config import ConfigError

GIB = 2**30
PRODUCT, ATTENTION, STREAM, LINK, LINE = 0.5, 0.35, 0.8, 0.7, 0.8


@dataclass(frozen=True)
class Hardware:
    """A device, its links and a processor core beside it; every rate as a training step reaches it.

    memory: bytes. low, full: FLOP/s of matrix products in 16 bits and in fp32 by kind (matmul, batched, conv,
    attention, experts: their MLP as it is compiled for a CPU). stream: bytes/s read and written. fresh: seconds that a
    byte of a new large block takes more, where the system gives it anew each time (a CPU). launch: least seconds of an
    operation. link: bytes/s to other ranks of the node, one direction; network: bytes/s of a node to others. latency:
    seconds of a collective, a doubling of ranks. reserve: bytes that are not the run's (context, libraries,
    fragmentation). image: seconds in which one core decodes a 500 x 375 JPEG and makes two views of 224 px of it.
    types: 16-bit types its products take.
    """

    name: str
    memory: float
    low: dict[str, float]
    full: dict[str, float]
    stream: float
    link: float
    network: float
    fresh: float = 0.0
    launch: float = 5e-6
    latency: float = 20e-6
    reserve: float = 2.0 * GIB
    image: float = 2.0e-3  # benchmarks/README.md, views of one image from JPEG bytes: one core of a CPU with avx512
    gpu: bool = True
    types: list[str] = field(default_factory=lambda: ["bf16", "fp16"])
    source: str = ""


def _sheet(
    name: str, source: str, *,
    memory: float, tensor: float, fp32: float, tf32: float | None, stream: float, link: float,
    types: tuple[str, ...] = ("bf16", "fp16"),
) -> Hardware:  # fmt: skip
    """A card from its data sheet.

    Args:
        source: the sheet and the variant of the card.
        memory: GB of 10^9 bytes. Drivers report a little more, so a plan errs to the safe side.
        tensor: dense TFLOPS of 16-bit matrix products with sums in fp32. fp32: TFLOPS of the ordinary cores.
        tf32: dense TFLOPS of TF32 (None: the card has none). torch uses it for convolutions in fp32
            (``torch.backends.cudnn.allow_tf32`` is on) and not for matrix products.
        stream: GB/s of the memory. link: GB/s to the other cards of the node, all links of a card, one direction.
        types: 16-bit types of its products.
    """

    def rates(product: float, conv: float) -> dict[str, float]:
        shares = {"matmul": PRODUCT * product, "experts": PRODUCT * product, "conv": PRODUCT * conv}
        shares |= {kind: ATTENTION * product for kind in ("batched", "attention")}
        return {kind: share * 1e12 for kind, share in shares.items()}

    return Hardware(
        name, memory * 1e9, rates(tensor, tensor), rates(fp32, tf32 or fp32), STREAM * stream * 1e9,
        LINK * link * 1e9, LINE * 400e9 / 8, types=list(types), source=source,
    )  # fmt: skip


# What the sheets print. "/ 2" undoes their way of counting: tensor figures of Hopper are printed "with sparsity", twice
# the dense ones (on the sheets of A100, A10 and L40S both stand, the V100 has no sparsity), and NVLink and PCIe are
# printed for both directions together.
_V100 = {"tensor": 125, "fp32": 15.7, "tf32": None, "stream": 900, "link": 300 / 2, "types": ("fp16",)}
_A100 = {"tensor": 312, "fp32": 19.5, "tf32": 156, "link": 600 / 2}
_HOPPER = {"tensor": 1979 / 2, "fp32": 67, "tf32": 989 / 2, "link": 900 / 2}
GPUS = {
    gpu.name: gpu
    for gpu in (
        # SXM2 (the PCIe card: 112 and 14 TFLOPS, no NVLink). Six NVLinks of 25 GB/s a direction; of eight cards in a
        # node no two have more than two of them between them.
        _sheet("V100-16G", "NVIDIA V100 data sheet, V100 SXM2", memory=16, **_V100),
        _sheet("V100-32G", "NVIDIA V100 data sheet, V100 SXM2", memory=32, **_V100),
        # SXM4 (the PCIe cards: 1,555 and 1,935 GB/s, NVLink between pairs only)
        _sheet("A100-40G", "NVIDIA A100 data sheet, A100 40GB SXM", memory=40, stream=1555, **_A100),
        _sheet("A100-80G", "NVIDIA A100 data sheet, A100 80GB SXM", memory=80, stream=2039, **_A100),
        # SXM5 (H100 PCIe: 1,513 TFLOPS with sparsity, 2 TB/s)
        _sheet("H100-80G", "NVIDIA H100 data sheet, H100 SXM", memory=80, stream=3350, **_HOPPER),
        # SXM; the same chip as the H100 with more and faster memory
        _sheet("H200-141G", "NVIDIA H200 data sheet, H200 SXM", memory=141, stream=4800, **_HOPPER),
        # PCIe gen 4 x16 and no NVLink: all cards of a node share their host's lanes
        _sheet("L40S-48G", "NVIDIA L40S data sheet", memory=48, tensor=362.05, fp32=91.6, tf32=183, stream=864,
               link=64 / 2),
        _sheet("A10-24G", "NVIDIA A10 data sheet", memory=24, tensor=125, fp32=31.2, tf32=62.5, stream=600,
               link=64 / 2),
    )
}  # fmt: skip
_SHORT = {name.split("-")[0]: name for name in GPUS}


def find(name: str) -> Hardware:
    """A GPU by name (H100-80G; H100 alone too), or a file of ``plan --calibrate``. Raises ConfigError."""
    known = name if name in GPUS else _SHORT.get(name)
    if known:
        return GPUS[known]
    if Path(name).is_file():
        return read(Path(name))
    raise ConfigError(
        f"--gpu {name}: no figures of it; take {', '.join(GPUS)}, or a file that `plan --calibrate FILE` wrote"
    )


def write(hardware: Hardware, path: Path) -> None:
    """As JSON, to be read, changed by hand and given to ``--gpu``. Raises ConfigError."""
    try:
        path.write_text(json.dumps(dataclasses.asdict(hardware), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--calibrate {path}: {error.strerror}; name a file that can be written") from None


def read(path: Path) -> Hardware:
    """What ``write`` wrote. Raises ConfigError."""
    names = {f.name for f in dataclasses.fields(Hardware)}
    try:
        tree: Any = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--gpu {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--gpu {path}: not valid JSON ({error}); make it anew with `plan --calibrate`") from None
    if not isinstance(tree, dict) or set(tree) != names:
        wrong = sorted(names.symmetric_difference(tree) if isinstance(tree, dict) else names)
        raise ConfigError(f"--gpu {path}: keys {', '.join(wrong)} missing or unknown; make it with `plan --calibrate`")
    if wrong := [line for key, value in tree.items() if (line := _wrong(key, value))]:
        raise ConfigError(f"--gpu {path}: {'; '.join(wrong)}")
    if tree["reserve"] >= tree["memory"]:
        raise ConfigError(
            f"--gpu {path}: reserve leaves nothing of memory: {tree['reserve']:g} of {tree['memory']:g} bytes"
        )
    return Hardware(**tree)


KINDS = ("matmul", "batched", "conv", "attention", "experts")
MAY_BE_ZERO = ("fresh", "launch", "latency", "reserve")


def _wrong(key: str, value: Any) -> str:
    """What is wrong with one value of a file; empty if nothing."""
    if key in ("low", "full"):
        good = isinstance(value, dict) and set(value) == set(KINDS)
        good = good and all(_number(v) and v > 0 for v in value.values())
        asked = f"FLOP/s above 0 of {', '.join(KINDS)}"
    elif key == "types":
        good = isinstance(value, list) and bool(value) and all(v in ("bf16", "fp16") for v in value)
        asked = "a list of bf16, fp16 or both"
    elif key == "gpu":
        good, asked = isinstance(value, bool), "true or false"
    elif key in ("name", "source"):
        good, asked = isinstance(value, str), "a text"
    else:
        least = key in MAY_BE_ZERO
        good = _number(value) and (value > 0 or (least and value == 0))
        asked = "a number of at least 0" if least else "a number above 0"
    return "" if good else f"{key} is {asked}, found {json.dumps(value)[:60]}"


def _number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
