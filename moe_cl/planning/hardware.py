"""What a device and its links do: published figures of GPUs, or a file that ``plan --calibrate`` measured.

A data sheet gives peaks; what a training step reaches of them is assumed here, the same for every card:

- matrix products, convolutions: 0.5 of the dense peak. Narayanan et al. 2021 (arXiv:2104.04473, table 1) train
  transformers at 44 to 52 % of an A100's peak, everything included; Dao 2023 (arXiv:2307.08691) counts 50 to 73 % for
  fused attention at long sequences on it, so ``batched`` products and attention of short ones get 0.35.
- memory: 0.8 of the bandwidth (large copies reach about 0.9, small and strided operations less).
- links: 0.7 of one direction (NCCL's tests on NVLink reach 0.7 to 0.8 of it), network: 0.8 of the line rate.
- 5 us for an operation whose work is less (launch), 20 us for a collective, once a doubling of the ranks.

They are assumptions: measure the cluster's own device with ``plan --calibrate`` and plan with that file.
"""

from __future__ import annotations

import dataclasses
import json
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
    attention). stream: bytes/s read and written. launch: least seconds of an operation. link: bytes/s to other ranks of
    the node, one direction; network: bytes/s of a node to others. latency: seconds of a collective, a doubling of
    ranks. reserve: bytes that are not the run's (context, libraries, fragmentation). image: seconds in which one core
    decodes a 500 x 375 JPEG and makes two views of 224 px of it. types: 16-bit types its products take.
    """

    name: str
    memory: float
    low: dict[str, float]
    full: dict[str, float]
    stream: float
    link: float
    network: float
    launch: float = 5e-6
    latency: float = 20e-6
    reserve: float = 2.0 * GIB
    image: float = 2.65e-3  # benchmarks/README.md, "loader: views": one core of a CPU with avx512
    gpu: bool = True
    types: list[str] = field(default_factory=lambda: ["bf16", "fp16"])
    source: str = ""


def _sheet(
    name: str, gib: float, low: float, full: float, memory: float, link: float, source: str,
    types: tuple[str, ...] = ("bf16", "fp16"),
) -> Hardware:  # fmt: skip
    """From a data sheet: dense TFLOPS, GB/s of the memory, GB/s of a link in one direction."""

    def rates(peak: float) -> dict[str, float]:
        shares = {"matmul": PRODUCT, "conv": PRODUCT, "batched": ATTENTION, "attention": ATTENTION}
        return {kind: share * peak * 1e12 for kind, share in shares.items()}

    return Hardware(
        name, gib * 1e9, rates(low), rates(full), STREAM * memory * 1e9, LINK * link * 1e9,
        LINE * 400e9 / 8, types=list(types), source=source,
    )  # fmt: skip


# Dense figures (half of what a sheet gives "with sparsity"). NVLink is quoted for both directions together: half of it
# stands here. fp32 is the ordinary cores' rate: torch leaves TF32 off for matrix products.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # 125 TFLOPS tensor (fp16 alone), 15.7 TFLOPS fp32, 900 GB/s, NVLink 300 GB/s
        _sheet("V100-16G", 16, 125, 15.7, 900, 150, "NVIDIA V100 data sheet, SXM2", ("fp16",)),
        _sheet("V100-32G", 32, 125, 15.7, 900, 150, "NVIDIA V100 data sheet, SXM2", ("fp16",)),
        # 312 TFLOPS bf16 and fp16, 19.5 TFLOPS fp32, 1,555 and 2,039 GB/s, NVLink 600 GB/s
        _sheet("A100-40G", 40, 312, 19.5, 1555, 300, "NVIDIA A100 data sheet, SXM4"),
        _sheet("A100-80G", 80, 312, 19.5, 2039, 300, "NVIDIA A100 data sheet, SXM4"),
        # 1,979 TFLOPS bf16 with sparsity, 67 TFLOPS fp32, 3.35 TB/s, NVLink 900 GB/s
        _sheet("H100-80G", 80, 989.5, 67, 3350, 450, "NVIDIA H100 data sheet, SXM5"),
        # as the H100, with 141 GB at 4.8 TB/s
        _sheet("H200-141G", 141, 989.5, 67, 4800, 450, "NVIDIA H200 data sheet, SXM"),
        # 362 TFLOPS bf16, 91.6 TFLOPS fp32, 864 GB/s, PCIe gen 4 x16: 64 GB/s both directions together
        _sheet("L40S-48G", 48, 362, 91.6, 864, 32, "NVIDIA L40S data sheet"),
        # 125 TFLOPS bf16, 31.2 TFLOPS fp32, 600 GB/s, PCIe gen 4 x16
        _sheet("A10-24G", 24, 125, 31.2, 600, 32, "NVIDIA A10 data sheet"),
    )
}
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
    """As JSON, to be read, changed by hand and given to ``--gpu``."""
    path.write_text(json.dumps(dataclasses.asdict(hardware), indent=2) + "\n")


def read(path: Path) -> Hardware:
    """What ``write`` wrote. Raises ConfigError."""
    names = {f.name for f in dataclasses.fields(Hardware)}
    try:
        tree: Any = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"--gpu {path}: not valid JSON ({error}); make it anew with `plan --calibrate`") from None
    if not isinstance(tree, dict) or set(tree) != names:
        wrong = sorted(names.symmetric_difference(tree) if isinstance(tree, dict) else names)
        raise ConfigError(f"--gpu {path}: keys {', '.join(wrong)} missing or unknown; make it with `plan --calibrate`")
    return Hardware(**tree)
