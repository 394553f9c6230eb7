"""``python -m moe_cl eval``: from a checkpoint and two folders to a table, a JSON and a journal line."""

from __future__ import annotations

import json

import pytest

from moe_cl.cli import main
from moe_cl.tracking.journal import Journal
from moe_cl.tracking.tail import read
from tests.evals.run_dir import make_images, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    make_run(out, make_images(tmp_path_factory.mktemp("images")))
    return out


def result(out, name):
    return json.loads((out / "evals" / f"{name}.json").read_text())


def test_summary(run, capsys):
    journal = Journal(run / "journal.jsonl")
    journal.event("start", step=0, total=2, ranks="2, experts over 2")
    journal.step(1, {"images_per_second": 100.0}, "")
    journal.close("FINISHED")
    assert main(["eval", "summary", "--checkpoint", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["knn_pixels"] == 1.0 and summary["linear_trained"] > 0.9 and summary["images_per_second"] == 100
    assert {"knn_untrained", "knn_trained", "seconds", "setting", "step"} <= set(summary)
    assert summary["setting"]["training"] == {"total": 2, "ranks": "2, experts over 2"}
    assert summary["setting"]["evaluation"]["k"] == 5 and "batch" in summary["setting"]["run"]
    text = capsys.readouterr().out
    assert "kNN (k 5), pixels" in text and "linear probe" in text
    line = read(run / "journal.jsonl")[-1]
    assert line["kind"] == "evaluation" and line["step"] == 7 and line["values"]["knn_pixels"] == 1.0


def test_knn_of_several_k_from_one_checkpoint(run):
    path = run / "checkpoints" / "step-00000007"
    assert main(["eval", "knn", "--checkpoint", str(path), "--k", "3", "7", "--dtype", "bf16", "--batch", "5"]) == 0
    out = result(run, "knn")
    assert set(out["values"]) == {"k3/top1", "k3/top5", "k7/top1", "k7/top5"} and out["values"]["k3/top1"] > 0.9
    assert out["setting"]["dtype"] == "bf16" and out["setting"]["test"].endswith("test")


@pytest.mark.parametrize(
    "options",
    [
        ["--protocol", "fast", "--epochs", "3"],
        ["--protocol", "mocov3_vit", "--epochs", "4", "--probe-batch", "16"],
        [
            "--protocol",
            "esvit",
            "--epochs",
            "2",
            "--lr",
            "1",
            "10",
            "--blocks",
            "2",
            "--probe-batch",
            "16",
            "--patches",
        ],
        ["--protocol", "crmoe", "--epochs", "2", "--select-on-test", "--probe-batch", "16"],
    ],
)
def test_linear_protocols(run, options):
    assert main(["eval", "linear", "--checkpoint", str(run), *options]) == 0
    out = result(run, "linear")
    assert out["values"]["top1"] > 0.6
    assert ("test" in out["selection"]) == ("--select-on-test" in options)
    assert out["setting"]["sweep"]["augment"] == ("fast" not in options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--test", "folder:/nowhere"], "folder:/nowhere"),
        (["--test", "torchvision:CIFAR1:x"], "did you mean CIFAR10"),
        (["--test", "torchvision:CIFAR10"], "needs the folder"),
        (["--test", "torchvision:CIFAR10:/nowhere"], "torchvision:CIFAR10:/nowhere"),
        (["--which", "student"], "no student"),
    ],
)
def test_mistakes_are_one_line(run, capsys, options, text):
    assert main(["eval", "knn", "--checkpoint", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert main(["eval", "knn", "--checkpoint", "/nowhere"]) == 2
