"""``plan`` on the command line: what it says, warns of and suggests."""

import json

import pytest

from moe_cl import cli
from moe_cl.planning.model import PARTS
from tests.small import make_shards

CRMOE = ["--recipe", "crmoe_vmoe_small_300ep", "--nodes", "4", "--gpus-per-node", "8", "moe.ep_size=8",
         "engine.ds_config=multinode_zero2_moe"]  # fmt: skip
SMALL = ["--recipe", "crmoe_vit_micro_fmnist", "--gpu", "A10", "views.size=16", "batch.global_batch=64",
         "model.options={img_size: 16, patch_size: 8, dim: 16, depth: 2, heads: 2}", "moe.experts=4",
         "moe.ep_size=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def plan(capsys, *argv):
    code = cli.main(["plan", *argv, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out.strip().splitlines()[-1]) if code < 2 else said.err.strip()


def test_the_papers_run(capsys):
    code, found = plan(capsys, *CRMOE)
    assert code == 0 and found["fits"] and found["warnings"] != found["alternatives"] == []
    assert found["batch"] == {"global_batch": 3072, "micro_batch": 96, "accumulation": 1, "ranks": 32}
    assert (found["precision"], found["zero_stage"], found["ep_nodes"]) == ("bf16", 2, 1)
    assert round(found["parameters"] / 1e6, 1) == 71.3 and round(found["active"] / 1e6, 1) == 21.6
    assert list(found["memory"]) == list(PARTS) and sum(found["memory"].values()) == found["memory_total"]
    assert sum(found["time"].values()) == pytest.approx(found["step_seconds"])
    experts, zero = found["sent"]["expert all-to-all"], found["sent"]["gradients and weights"]
    assert experts["rank"] > 0 == experts["node"] and zero["rank"] > zero["node"] / 8 > 0  # ep 8 stays inside a node
    # 2 views of the student three times and of the teacher once, 9.2 GFLOP each, and a tenth more for the heads
    assert 96 * 8 * 9.2e9 < found["flops"] < 1.1 * 96 * 8 * 9.2e9
    assert found["steps"] == 300 * (1281167 // 3072)
    assert found["gpu_hours"] == pytest.approx(32 * found["hours"])
    assert found["images_per_second_node"] == pytest.approx(3072 / found["step_seconds"] / 4)


def test_too_much_for_the_card(capsys):
    large = [*SMALL, "--gpu", "V100", "engine.ds_config=v100_fp16", "views.size=128", "batch.global_batch=24576",
             "model.options={img_size: 128, patch_size: 8, dim: 64, depth: 2, heads: 2}"]  # fmt: skip
    code, found = plan(capsys, *large)
    assert code == 1 and not found["fits"] and found["warnings"][0].startswith("does not fit: a rank needs ")
    first = found["alternatives"][0]
    assert first["fits"] and first["memory_total"] <= found["memory_room"]
    times = [a["step_seconds"] for a in found["alternatives"] if a["fits"]]
    assert times == sorted(times)
    assert any("batch.exact_large_batch=true" in a["settings"] for a in found["alternatives"])
    assert all(a["memory_total"] < found["memory_total"] for a in found["alternatives"])
    code, again = plan(capsys, *large, *first["settings"])
    assert code == 0 and again["memory_total"] == first["memory_total"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--gpu", "V100", "engine.precision=bf16"], "V100-32G multiplies no bf16: set engine.precision=fp16"),
        (["--nodes", "2", "--gpus-per-node", "2", "moe.ep_size=4"], "moe.ep_size=2 stays inside a node"),
        (["batch.accumulation=2", "engine.precision=fp32"], "batch.exact_large_batch=true keeps them all"),
        (["--gpu", "V100", "engine.ds_config=gpu1_bf16"], "says float16 (engine.ds_config=v100_fp16)"),
        (["--nodes", "2", "--gpus-per-node", "6", "moe.ep_size=4", "batch.global_batch=96"], "stand on 2 nodes"),
        (["--network", "0.1", "--nodes", "2"], "keep the shards on local disks"),
    ],
)
def test_warnings(capsys, argv, says):
    _, found = plan(capsys, *SMALL, *argv)
    assert any(says in line for line in found["warnings"]), found["warnings"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "plan needs --recipe NAME"),
        (["--recipe", "crmoe_vmoe_smal_300ep"], "did you mean crmoe_vmoe_small_300ep?"),
        ([*SMALL, "--gpu", "B7"], "--gpu B7: no figures of it"),
        ([*SMALL, "--gpus-per-node", "3"], "does not divide over 3 ranks"),
        ([*SMALL, "moe.ep_size=3"], "moe.ep_size 3 does not divide the 4 experts"),
        ([*SMALL, "--network", "0"], "--network 0: Gbit/s above 0 are needed"),
        ([*SMALL, "--network", "inf"], "--network inf: Gbit/s above 0 are needed"),
        ([*SMALL, "--images", "50"], "data.streams 64 is more than the 50 images"),
        ([*SMALL, "--images", "100", "batch.global_batch=96"], "100 images in 64 streams give 64 positions an epoch"),
        (
            [*SMALL, "schedule.epochs=1", "schedule.warmup_epochs=4"],
            "is longer than the 1.0 epochs",
        ),
        ([*SMALL, "engine.profile=[5,2]"], "engine.profile [5, 2] takes two steps"),
        ([*SMALL, "data.train=/no/such"], "/no/such does not exist"),
        ([*SMALL, "--data", "/no/such"], "to plan without it, say --images N"),
        ([*SMALL, "--scaling", "weak"], "set batch.micro_batch"),
        ([*SMALL, "engine.ds_config=zero3_dense"], "asks for ZeRO stage 3"),
    ],
)
def test_refused_in_one_line(capsys, argv, says):
    code, said = plan(capsys, *argv)
    assert code == 2 and says in said and "\n" not in said


def test_scaling(capsys):
    _, weak = plan(capsys, *SMALL, "--nodes", "4", "--scaling", "weak", "batch.micro_batch=32")
    assert [row["batch"]["global_batch"] for row in weak] == [32, 64, 128]
    assert weak[0]["efficiency"] == 1.0 > weak[1]["efficiency"] > 0
    assert [row["flops"] for row in weak] == pytest.approx([weak[0]["flops"]] * 3, rel=0.02)
    three = [*SMALL, "batch.global_batch=96", "--nodes", "3"]
    _, strong = plan(capsys, *three, "--scaling", "strong", "--simulate")  # the size asked for is a row, and simulated
    assert [row["batch"]["micro_batch"] for row in strong] == [96, 48, 32]
    assert strong[2]["simulation"]["world"] == 3 and strong[2]["simulation"]["errors"] == []


def test_the_loader_follows_the_data_set(capsys, tmp_path):
    """16 px PNGs cost a core about a fifteenth of ImageNet's pictures, and hardly any disk."""
    _, plain = plan(capsys, *SMALL, "--images", "960")
    assert plain["data"]["source"] == "as told" and plain["data"]["bytes"] == 110_000
    shards = make_shards(tmp_path)
    _, found = plan(capsys, *SMALL, "--data", str(shards), "data.repeat=[3]")
    assert found["images"] == 3 * 96 and found["data"]["pixels"] == 256 and found["steps"] > 0
    assert 512 < found["data"]["bytes"] < 2000 and found["disk_mb_s_node"] < plain["disk_mb_s_node"] / 50
    assert found["loader_cores_node"] / found["images_per_second"] < 0.2e-3
    assert found["loader_cores_node"] < plain["loader_cores_node"] / 5


def test_a_suggestion_is_one_that_the_card_can_follow(capsys):
    """No JSON in bf16 for a card without it, nothing that needs more than what is planned."""
    _, found = plan(capsys, "--recipe", "mocov3_vit_small_300ep", "--nodes", "2", "--gpus-per-node", "8", "--gpu",
                    "V100-16G", "engine.ds_config=v100_fp16", "batch.global_batch=8192")  # fmt: skip
    assert not found["fits"] and found["alternatives"]
    for other in found["alternatives"]:
        assert other["memory_total"] < found["memory_total"]
        assert not any(word.startswith("engine.ds_config=") for word in other["settings"]), other


def test_read_by_a_person(capsys):
    assert cli.main(["plan", *CRMOE]) == 0
    out = capsys.readouterr().out
    assert "batch: 3072 = 96 micro x 1 accumulation x 32 ranks; bf16, ZeRO 2, experts over 8" in out
    assert "MB out of a node" in out and "images (ImageNet-1k's)" in out
    assert "NVIDIA H100 data sheet" in out and "expert all-to-all" in out and "GPU hours" in out
    assert cli.main(["plan", *SMALL, "--nodes", "2", "--scaling", "strong"]) == 0
    assert "efficiency" in capsys.readouterr().out
