"""``cpp/``: compiled once a machine, loaded here, used where products are an x86-64 CPU's in fp32 or bf16.

Without a compiler, or on another processor, ``get`` is None and ``mlp.ExpertMLP`` goes through torch's operations: the
same results within rounding, slower. ``MOE_CL_KERNELS=0`` asks for that.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).with_name("cpp")
FLAGS = "-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fopenmp -fPIC".split()
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # or a rounding is a call, one number at a time
FLAGS += ["-fno-strict-aliasing"]  # pairs of bf16 are moved as 32-bit words
LIMIT = 120  # seconds of a compiler that does not end
# Rows of an expert are filled up to a multiple of it; read there, since buffers made here are written by it.
FILL = int(re.search(r"\bFILL = (\d+)", (SOURCES / "queue.h").read_text("utf-8"))[1])
MULTIPLE = 16  # both widths are multiples of it
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Kernels:
    """The library's functions on tensors. Legend as in ``mlp``: R rows, M assignments, E experts, D width, H hidden."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))

    def works(self, dtype: torch.dtype) -> bool:
        """Whether this processor multiplies in ``dtype``."""
        return bool(self._of("works", dtype)())

    def forward(
        self, x: Tensor, token: Tensor, counts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, keep: bool,
        last: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """h (F, H), kept for the backward or None, and y (M + 1, D) whose last row is 0, or None without ``last``."""
        experts, hidden, d = w1.shape
        filled = int((-(-counts // FILL) * FILL).sum())
        h = x.new_empty(filled, hidden) if keep else None
        y = x.new_empty(len(token) + 1, d) if last else None
        if y is not None:
            y[-1] = 0
        self._call("forward", x.dtype, (experts, d, hidden), counts, token, x, w1, b1, w2, b2, h, y)
        return h, y

    def backward(
        self, x: Tensor, g: Tensor, p: Tensor, token: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """gx (M + 1, D) and gp (M + 1,) with a last 0, and the gradients of w1, b1, w2, b2."""
        experts, hidden, d = w1.shape
        gx, gp = x.new_empty(len(token) + 1, d), w1.new_empty(len(token) + 1)
        gx[-1], gp[-1] = 0, 0
        sums = [w1.new_empty(q) for q in (w1.shape, (experts, hidden), w2.shape, (experts, d))]
        self._call("backward", x.dtype, (experts, d, hidden), counts, token, x, g, p, w1, w2, h, gx, gp, *sums)
        return gx, gp, sums

    def combine(self, values: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
        """out[r] = sum_j weights[r, j] values[inverse[r, j]] in fp32: (R, D)."""
        (rows, k), d = inverse.shape, values.shape[1]
        out = values.new_empty(rows, d, dtype=torch.float32)
        self._call("combine", values.dtype, (rows, k, d), values, inverse, weights, out)
        return out

    def _of(self, name: str, dtype: torch.dtype) -> ctypes._CFuncPtr:
        return getattr(self.library, f"moe_{name}_{NAMES[dtype]}")

    def _call(self, name: str, dtype: torch.dtype, sizes: tuple[int, ...], *tensors: Tensor | None) -> None:
        """Tensors in the function's order; outputs are contiguous, inputs are made so.

        Raises:
            RuntimeError: no memory, or a product that oneDNN refuses.
        """
        whole = [None if t is None else t.contiguous() for t in tensors]  # held until the call is over
        pointers = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in whole]
        if self._of(name, dtype)(*map(ctypes.c_int64, sizes), *pointers):
            raise RuntimeError(f"experts' {name}: no memory left, or oneDNN was switched off after the forward")


def get(x: Tensor, dtype: torch.dtype, *parameters: Tensor) -> Kernels | None:
    """The kernels if they can multiply rows x (R, D) by w1 (E, H, D), b1, w2, b2 in ``dtype``.

    They can with fp32 parameters, products in fp32 or bf16, both widths multiples of 16; not where oneDNN is switched
    off, as it is where FLOPs are counted, and not for tensors without data.
    """
    fits = not any(width % MULTIPLE for width in parameters[0].shape[1:])
    fits = fits and dtype in NAMES and all(p.dtype == torch.float32 for p in parameters)
    if not (fits and x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)):
        return None
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    kernels = load()
    return kernels if kernels is not None and _works(dtype) else None


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    return load().works(dtype)


@functools.cache
def load() -> Kernels | None:
    """The compiled library, None where there is none: another processor, no compiler, or ``MOE_CL_KERNELS=0``."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    openmp = _openmp()
    here = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if os.environ.get("MOE_CL_KERNELS") == "0" or not here or compiler is None or openmp is None:
        return None
    try:
        return Kernels(build(compiler, openmp))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def build(compiler: str, openmp: str) -> Path:
    """The library for this source, torch, processor and compiler: from the user's cache, or made now (in seconds).

    Its name ends with a hash of what is in it: a damaged one is made again (to load it could end the process).
    """
    torch_libraries = str(Path(torch.__file__).parent / "lib")
    # Torch's own OpenMP: a second one would bring threads of its own, and both would wait for the other's cores.
    link = [openmp, f"-L{torch_libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_libraries}"]
    version = _run([compiler, "--version"])
    sources = [path.read_bytes() for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])]
    settings = "\n".join([torch.__version__, _processor(), *FLAGS, *link]).encode()
    name, folder = f"kernels-{_hash(b''.join([*sources, version, settings]))}", _folder()
    for path in folder.glob(f"{name}-*.so"):
        if _own(path) and path.name == f"{name}-{_hash(path.read_bytes())}.so":
            return path
    with tempfile.TemporaryDirectory(dir=folder) as place:  # ranks that start together make it side by side
        made = Path(place) / "kernels.so"
        _run([compiler, *FLAGS, "-c", str(SOURCES / "mlp.cpp"), "-o", f"{made}.o"])
        # Linked without -fopenmp, which would name the compiler's library.
        _run([compiler, "-shared", f"{made}.o", *link, "-o", str(made)])
        made.chmod(0o700)
        return made.replace(folder / f"{name}-{_hash(made.read_bytes())}.so")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=LIMIT).stdout


def _folder() -> Path:
    """Where libraries are kept: a folder that nobody else can write to; without one, this process's own for now."""
    with contextlib.suppress(OSError, RuntimeError):  # a read-only home; no home at all
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_cl"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _own(cache) and os.access(cache, os.W_OK):
            return cache
    folder = tempfile.mkdtemp(prefix="moe_cl-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _own(path: Path) -> bool:
    """What is loaded runs as this user: nobody else may have written it."""
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _processor() -> str:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _openmp() -> str | None:
    """Torch's OpenMP library: the one beside it, or the one that is loaded."""
    beside = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    found = [str(p) for p in beside if re.match(r"lib(gomp|iomp5|omp)[-.]", p.name)]
    maps = Path("/proc/self/maps")
    if not found and maps.exists():
        found = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[-.][-.\w]*", maps.read_text())
    return found[0] if found else None
