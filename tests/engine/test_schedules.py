"""Schedules against the published code's values."""

from pathlib import Path

import numpy as np
import pytest

from moe_cl.config import OptimConfig, ScheduleConfig, TeacherConfig
from moe_cl.engine import schedules

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("case", ["v3_r50_100", "v3_vit_300", "v3_tiny"])
def test_mocov3(case):
    z = {k.split("/")[1]: v for k, v in np.load(GOLDEN / "moco_schedules.npz").items() if k.startswith(case + "/")}
    n, epochs = int(z["iters_per_epoch"]), int(z["epochs"])
    peak = schedules.scaled_lr(OptimConfig(base_lr=float(z["base_lr"])), int(z["batch"]))
    assert peak == pytest.approx(float(z["scaled_lr"]), rel=1e-15)
    cfg = ScheduleConfig(epochs=epochs, warmup_epochs=float(z["warmup"]))
    teacher = TeacherConfig(momentum=float(z["m0"]))
    for i, lr, m in zip(z["iter"], z["lr"], z["moco_m"], strict=True):
        assert schedules.learning_rate(int(i), n, peak, cfg) == pytest.approx(lr, rel=1e-12, abs=1e-15)
        assert schedules.teacher_momentum(int(i), n, teacher, epochs) == pytest.approx(m, rel=1e-14)


@pytest.mark.parametrize("case", ["v1", "v2_200"])
def test_per_epoch(case):
    z = np.load(GOLDEN / "moco_schedules.npz")
    cfg = ScheduleConfig(
        epochs=int(z[f"{case}/epochs"]),
        kind="cosine" if z[f"{case}/cos"] else "step",
        per="epoch",
        milestones=[int(m) for m in z[f"{case}/milestones"]],
    )
    base = float(z[f"{case}/base_lr"])
    ours = [schedules.learning_rate(e * 5 + 3, 5, base, cfg) for e in range(int(cfg.epochs))]
    np.testing.assert_allclose(ours, z[f"{case}/lr_per_epoch"], rtol=1e-12)


@pytest.mark.parametrize("number", range(5))
def test_dino_arrays(number):
    z = np.load(GOLDEN / "esvit_sched.npz")
    base, end, epochs, n, warm, start = z[f"cos{number}__args_base_final_epochs_niter_warmep_startwarm"]
    ours = [schedules.dino(i, int(n), base, end, epochs, warm, start) for i in range(int(epochs * n))]
    np.testing.assert_allclose(ours, z[f"cos{number}"], rtol=1e-12, atol=1e-15)


def test_weight_decay_and_constant():
    assert schedules.weight_decay(5, 2, OptimConfig(weight_decay=0.3), 10) == 0.3
    grows = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    assert schedules.weight_decay(0, 10, grows, 3) == pytest.approx(0.04)
    assert 0.39 < schedules.weight_decay(29, 10, grows, 3) < 0.4
    assert schedules.teacher_momentum(7, 2, TeacherConfig(0.99, "constant"), 10) == 0.99
    assert schedules.learning_rate(99, 1, 2.0, ScheduleConfig(kind="constant")) == 2.0


def test_square_root_scaling():
    assert schedules.scaled_lr(OptimConfig(base_lr=0.075, lr_scaling="sqrt"), 4096) == pytest.approx(4.8)
    assert schedules.scaled_lr(OptimConfig(base_lr=0.1, lr_scaling="none"), 4096) == 0.1
