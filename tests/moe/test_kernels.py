"""The compiled kernels against torch's products in fp64: every routing, idle experts, rows elsewhere, any threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.moe import kernels, mlp
from moe_cl.moe.dispatch import sort_by_expert

ROOT = Path(__file__).resolve().parents[2]


def has_processor() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512_bf16" in info.read_text()


def native(dtype: torch.dtype) -> kernels.Kernels:
    found = kernels.get(torch.zeros(1, 16), dtype, *stacks(16, 16))
    if found is None:
        # In CI a machine that could have them and has none is a failure, not a reason to test nothing.
        assert not (os.environ.get("MOE_CL_CI") and has_processor()), "no compiled kernels: kernels.build says why"
        pytest.skip("no compiler, or a processor without oneDNN's small products")
    return found


def draw(rows: int, experts: int, width: int, hidden: int, k: int, spread: int, elsewhere: bool, seed: int):
    """Inputs, with ids of ``spread`` experts alone and, if ``elsewhere``, some that say "not on this rank"."""
    g = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(rows, width, generator=g), torch.rand(rows, k, generator=g)
    ids = (torch.randint(0, spread, (rows, 1), generator=g) + torch.arange(k)) % experts
    if elsewhere:
        ids[torch.rand(rows, k, generator=g) < 0.3] = experts
    sizes = [(experts, hidden, width), (experts, hidden), (experts, width, hidden), (experts, width)]
    parameters = [torch.randn(size, generator=g) / size[-1] ** 0.5 for size in sizes]
    return ids, [x, weights, *parameters], torch.randn(rows, width, generator=g)


def run(ids, inputs, cotangent, dtype, recompute=False, wide=False) -> list[torch.Tensor]:
    """Output and all gradients."""
    kind = torch.float64 if wide else torch.float32
    leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
    experts = len(leaves[2])
    plan = sort_by_expert(ids, experts, complete=bool((ids < experts).all()))
    y = mlp.ExpertMLP.apply(*leaves, ids, plan, kind if wide else dtype, True, recompute)
    y.backward(cotangent.to(kind))
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 300), experts=st.integers(1, 6), width=st.sampled_from([16, 48, 144]),
    hidden=st.sampled_from([16, 80, 160]), k=st.integers(1, 3), spread=st.integers(1, 6), elsewhere=st.booleans(),
    recompute=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_equals_torchs_products(
    dtype, tolerance, rows, experts, width, hidden, k, spread, elsewhere, recompute, seed
) -> None:
    native(dtype)
    case = draw(rows, experts, width, hidden, min(k, experts), min(spread, experts), elsewhere, seed)
    got, want = run(*case, dtype, recompute), run(*case, dtype, wide=True)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == torch.float32, number
        if b.numel():
            least = width**0.5 if number == 2 else 1.0  # <g, y> of one row may cancel; its terms are about 1
            assert (a - b).abs().max().item() / max(b.abs().max().item(), least) < tolerance, number
    idle = torch.bincount(case[0][case[0] < experts].flatten(), minlength=experts) == 0
    assert all((grad[idle] == 0).all() for grad in got[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype) -> None:
    native(dtype)
    case = draw(700, 8, 64, 160, 2, 5, False, 3)
    before, out = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            kept = [run(*case, dtype) for _ in range(3)]
            out += [kept, [run(*case, dtype, recompute=True)]]
    finally:
        torch.set_num_threads(before)
    first = out[0][0]
    assert all(torch.equal(a, b) for runs in out for each in runs for a, b in zip(first, each, strict=True))


def test_a_row_that_is_not_a_number_stays_alone() -> None:
    """Rows share tiles and fill rows stand beside them: nothing of one may reach another row's output or gradient."""
    native(torch.float32)
    ids, inputs, cotangent = draw(37, 3, 16, 32, 2, 3, False, 5)
    inputs[0][11] = float("nan")
    y, grad_x = run(ids, inputs, cotangent, torch.float32)[:2]
    others = torch.arange(37) != 11
    assert y[11].isnan().all() and y[others].isfinite().all()
    assert grad_x[11].isnan().all() and grad_x[others].isfinite().all()


def stacks(width: int, hidden: int, **kind: torch.dtype) -> list[torch.Tensor]:
    sizes = {"w1": (2, hidden, width), "b1": (2, hidden), "w2": (2, width, hidden), "b2": (2, width)}
    return [torch.zeros(size, dtype=kind.get(name, torch.float32)) for name, size in sizes.items()]


def test_who_does_not_get_them() -> None:
    x = torch.zeros(4, 16)
    assert kernels.get(x, torch.float64, *stacks(16, 16)) is None
    assert kernels.get(x, torch.bfloat16, *stacks(24, 16)) is None
    assert kernels.get(x, torch.bfloat16, *stacks(16, 40)) is None
    assert kernels.get(x, torch.bfloat16, *stacks(16, 16, b2=torch.bfloat16)) is None
    assert kernels.get(x.to("meta"), torch.float32, *stacks(16, 16)) is None


@pytest.mark.parametrize("setting", [{"MOE_CL_KERNELS": "0"}, {"CXX": "false"}])
def test_without_a_compiler_there_are_none(setting, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert kernels.load.__wrapped__() is None


def test_packed_weights_stay_until_their_tiles_are_done(monkeypatch) -> None:
    """Experts 0 and 6i share a place among the packed ones (2 threads); those between have no rows to wait for."""
    native(torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ids, inputs, cotangent = draw(150, 20, 16, 16, 1, 1, False, 9)
        ids = torch.arange(150)[:, None] % 2 * 18
        want = run(ids, inputs, cotangent, torch.float32, wide=True)
        for _ in range(60):
            got = run(ids, inputs, cotangent, torch.float32)
            assert all((a - b).abs().max() < 1e-4 for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(before)


def test_weights_of_another_layout_and_another_default_type() -> None:
    """Weights stored transposed get gradients all the same; outputs are fp32 whatever the default type is."""
    native(torch.float32)
    ids, inputs, cotangent = draw(40, 3, 16, 32, 2, 3, False, 7)
    want = run(ids, inputs, cotangent, torch.float32)
    inputs[2] = inputs[2].transpose(1, 2).contiguous().transpose(1, 2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = run(ids, inputs, cotangent, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_product_that_is_refused_is_an_error_and_no_end() -> None:
    """oneDNN switched off between forward and backward."""
    native(torch.bfloat16)
    x = torch.randn(100, 32, requires_grad=True)
    parameters = [p.requires_grad_() for p in stacks(32, 32)]
    ids = torch.arange(100)[:, None] % 2
    y = mlp.ExpertMLP.apply(
        x, torch.ones(100, 1), *parameters, ids, sort_by_expert(ids, 2), torch.bfloat16, True, False
    )
    torch._C._set_mkldnn_enabled(False)
    try:
        with pytest.raises(RuntimeError, match="switched off after the forward"):
            y.sum().backward()
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_a_folder_that_others_may_write_to_is_not_used_nor_a_damaged_file(monkeypatch, tmp_path) -> None:
    native(torch.float32)
    compiler, openmp = "g++", kernels._openmp()
    (tmp_path / "moe_cl").mkdir()
    (tmp_path / "moe_cl").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels._folder().parent != tmp_path  # this process's own
    (tmp_path / "moe_cl").chmod(0o700)
    assert kernels._folder().parent == tmp_path
    path = kernels.build(compiler, openmp)
    assert kernels.build(compiler, openmp) == path
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    assert kernels.build(compiler, openmp).read_bytes() == whole  # made again
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert kernels._folder().is_dir()


@pytest.mark.processes
def test_processes_that_start_together_share_one_build(tmp_path) -> None:
    native(torch.float32)
    code = "from moe_cl.moe import kernels as k; import torch; print(k.load().works(torch.float32))"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert [rank.communicate()[0].decode().strip() for rank in ranks] == ["True", "True"]
    assert [path.suffix for path in (tmp_path / "moe_cl").iterdir()] == [".so"]
