"""DINO's and EsViT's losses, centres and matches against the published code; the fused region loss against plain."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_cl.losses import distillation as dist

GOLDEN = Path(__file__).parents[1] / "golden"
DINO, DDINO, SCHED = (np.load(GOLDEN / f"esvit_{n}.npz") for n in ("dino", "ddino", "sched"))
TAU = {0: 0.04, 5: dist.teacher_temperature(5, 0.04, 0.07, 30), 40: 0.07}


def tensor(z, name, dtype=torch.float32):
    return torch.from_numpy(z[name]).to(dtype)


@pytest.mark.parametrize("epoch", TAU)
@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_view_loss(case, epoch):
    batch = int(DINO[f"{case}__meta_B_K_nlocal"][0])
    at = f"{case}__ep{epoch}__"
    s = tensor(DINO, f"{case}__student").requires_grad_()
    t, centre = tensor(DINO, f"{case}__teacher"), tensor(DINO, f"{case}__center_before")
    q = dist.targets(t.unflatten(0, (2, batch)), centre, TAU[epoch])
    loss = dist.view_loss(s.unflatten(0, (-1, batch)), q, 0.1)
    loss.backward()
    np.testing.assert_allclose(loss.item(), DINO[at + "loss"], rtol=1e-6)
    np.testing.assert_allclose(s.grad, DINO[at + "grad_student"], atol=1e-6)
    after = dist.next_centre(centre, t.mean(0), 0.9)
    np.testing.assert_allclose(after, DINO[at + "center_after"], atol=1e-6)


def test_soft_targets():
    batch = int(DINO["mix__meta_B_K_nlocal"][0])
    q = dist.targets(tensor(DINO, "mix__teacher").unflatten(0, (2, batch)), torch.zeros(1, 1), 0.07)
    s = tensor(DINO, "mix__student").unflatten(0, (-1, batch))
    np.testing.assert_allclose(
        dist.view_loss(s, q, 0.1, tensor(DINO, "mix__targets")), DINO["mix__ep40__loss"], rtol=1e-6
    )


def resolutions(case, name, meta, dtype=torch.float32):
    """Rows of a ddino array as (V_r, B, T_r, D) a resolution."""
    batch, ng, nl, nlocal = (int(v) for v in meta[:4])
    x = tensor(DDINO, f"{case}__{name}", dtype)
    parts = [x[: 2 * batch * ng].view(2, batch, ng, -1)]
    if nlocal:
        parts.append(x[2 * batch * ng :].view(nlocal, batch, nl, -1))
    return parts


def region(case, meta, tau, dtype=torch.float32):
    s, t = resolutions(case, "s_reg", meta, dtype), resolutions(case, "t_reg", (*meta[:3], 0), dtype)[0]
    features, t_fea = resolutions(case, "s_fea", meta), resolutions(case, "t_fea", (*meta[:3], 0))[0]
    s = [x.requires_grad_() for x in s]
    pick = dist.match_regions(t_fea, *features)
    weights = dist.pair_weights(tuple((x.shape[0], x.shape[2]) for x in s), 2, t.device)
    centre = tensor(DDINO, f"{case}__center_grid_before", dtype)[0]
    rows = dist.region_rows(s), dist.region_rows([t])
    return dist.region_loss(*rows, pick, weights, centre, 0.1, tau), pick, s


@pytest.mark.parametrize("epoch", TAU)
@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_region_loss(case, epoch):
    meta = DDINO[f"{case}__meta_B_Ng_Nl_nlocal_K_P"]
    at = f"{case}__ep{epoch}__"
    loss, _, s = region(case, meta, TAU[epoch])
    (0.5 * loss).backward()
    np.testing.assert_allclose(loss.item(), DDINO[at + "loss_region"], rtol=2e-6)
    grad = torch.cat([x.grad.flatten(0, 2) for x in s])
    np.testing.assert_allclose(grad, DDINO[at + "grad_s_reg"], atol=1e-6)
    exact, _, _ = region(case, meta, TAU[epoch], torch.float64)
    np.testing.assert_allclose(exact.item(), DDINO[at + "loss_region64"], rtol=1e-6)


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_matches(case):
    meta = DDINO[f"{case}__meta_B_Ng_Nl_nlocal_K_P"]
    batch, ng, nl, nlocal = (int(v) for v in meta[:4])
    pick = region(case, meta, 0.07)[1]
    sizes = [ng] * 2 + [nl] * nlocal
    for i, v in DDINO[f"{case}__pairs"]:
        start = sum(sizes[:v])
        ours = pick[:, start : start + sizes[v], i] - i * ng
        np.testing.assert_array_equal(ours, DDINO[f"{case}__match_t{i}_s{v}"])


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_fused_last_layer_is_the_plain_one(chunk, monkeypatch):
    """Loss and gradients of rows and weight as from whole logits and autograd, for any chunk."""
    monkeypatch.setattr(dist, "_CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    batch, counts, tokens, wide, out = 3, ((2, 9), (3, 4)), 9, 5, 17
    size = sum(v * t for v, t in counts)
    z, zt = (torch.randn(batch, n, wide, generator=g, dtype=torch.float64) for n in (size, 2 * tokens))
    w, wt = torch.randn(2, out, wide, generator=g, dtype=torch.float64).unbind()
    centre = torch.randn(out, generator=g, dtype=torch.float64)
    pick = torch.stack([torch.randint(i * tokens, (i + 1) * tokens, (batch, size), generator=g) for i in (0, 1)], 2)
    weights = dist.pair_weights(counts, 2, z.device)
    z.requires_grad_(), w.requires_grad_()
    fused = dist.region_loss(z, zt, pick, weights, centre, 0.1, 0.05, w, wt)
    got = torch.autograd.grad(3 * fused, (z, w))
    log_p = (F.linear(z, w) / 0.1).log_softmax(-1)
    q = ((F.linear(zt, wt) - centre) / 0.05).softmax(-1)
    plain = 0
    for i in (0, 1):
        chosen = q.gather(1, pick[:, :, i, None].expand(-1, -1, out))
        plain = plain - ((chosen * log_p).sum(-1) * weights[:, i]).sum() / batch
    want = torch.autograd.grad(3 * plain, (z, w))
    torch.testing.assert_close(fused, plain, rtol=1e-7, atol=1e-12)  # the weights are float32 numbers
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_fp16_keeps_the_gradient_of_many_prototypes():
    """K 65536, 32 images, weights as 98 tokens have them: an entry is about 5e-8, below what fp16 can hold."""
    g = torch.Generator().manual_seed(0)
    shapes = (32, 2), (32, 4), (65536,), (65536,)
    z, zt, w, wt = (F.normalize(torch.randn(*shape, 8, generator=g), dim=-1) for shape in shapes)
    pick = torch.tensor([0, 2]).expand(32, 2, 2)
    weights, centre = torch.full((2, 2), 1 / 98), torch.zeros(65536)
    grads = []
    for low in (False, True):
        leaves = [x.clone().requires_grad_() for x in (z, w)]
        with torch.autocast("cpu", torch.float16, enabled=low):
            loss = dist.region_loss(leaves[0], zt, pick, weights, centre, 0.1, 0.07, leaves[1], wt)
        grads.append(torch.autograd.grad(loss, leaves))
    for want, got in zip(*grads, strict=True):
        assert got.isfinite().all()
        assert (got - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("number", range(3))
def test_temperature(number):
    start, end, warmup, epochs = SCHED[f"ttemp{number}__args_warmup_final_warmepochs_epochs"]
    ours = [dist.teacher_temperature(e, start, end, int(warmup)) for e in range(int(epochs))]
    np.testing.assert_allclose(ours, SCHED[f"ttemp{number}"], rtol=1e-12)


def test_warm_up_longer_than_the_run():
    assert dist.teacher_temperature(2, 0.04, 0.07, 30) < 0.07  # the published code crashes
    assert dist.teacher_temperature(0, 0.04, 0.07, 1) == 0.04
    assert dist.teacher_temperature(0, 0.04, 0.07, 0) == 0.07
