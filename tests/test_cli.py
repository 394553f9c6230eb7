"""Bad input: one clear line on stderr, exit code 2, before any rank starts."""

import subprocess
import sys
import time

import pytest

from moe_cl import cli
from tests.small import ENV, ROOT, make_shards, settings


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def refuse(capsys, *argv):
    assert cli.main(["pretrain", *argv]) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and err.startswith("moe_cl: ")
    return err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data.train=nowhere/at/all", "nowhere/at/all does not exist; make shards with `python -m data_prep shard"),
        ("data.train=nowhere/{000..003}.tar", "does not exist; check the shard pattern"),
        ("moe.ep_size=3", "moe.ep_size 3 does not divide the 4 experts"),
        ("batch.global_batch=17", "batch.global_batch 17 does not divide over 2 ranks"),
        ("schedule.max_steps=0", "schedule.max_steps 0 must be at least 1"),
        ("schedule.epochs=.nan", "schedule.epochs nan must be above 0"),
        ("teacher.momentum=2", "teacher.momentum 2.0 lies between 0 and 1"),
        ("optim.betas=[0.9]", "optim.betas [0.9] takes two numbers"),
        ("params.tempature=1", "unknown key params.tempature; did you mean temperature?"),
        ("method=crmo", "did you mean crmoe?"),
        ("model.backbone=vti", "unknown backbone 'vti'; did you mean vit?"),
        ("model.options={depht: 2}", "has no option 'depht'; did you mean depth?"),
        ("views.spec=mocov4", "views.spec: unknown 'mocov4'"),
        ("eval.knn_every=1", "needs eval.bank"),
        ("track.uri=ftp://x", "is no MLflow address"),
        ("batch.global_batch=512", "less than one global batch of 512"),
        ("batch.exact_large_batch=true & model.backbone=resnet18 & method=mocov3 & model.options={} & moe.blocks=none "
         "& moe.ep_size=1", "needs a backbone without batch norm"),
    ],
)  # fmt: skip
def test_refused_before_any_rank_starts(shards, tmp_path, capsys, change, says):
    changes = change.split(" & ")
    out = tmp_path / "run"
    assert says in refuse(capsys, "--check", "2", *settings(shards, out, *changes))
    assert not out.exists()


def test_empty_folder(tmp_path, capsys):
    assert "has neither dataset.json nor a .tar" in refuse(
        capsys, "--check", "2", *settings(tmp_path, tmp_path / "run")
    )


def test_zero_3_with_experts(shards, tmp_path, capsys):
    path = tmp_path / "zero3.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    err = refuse(capsys, "--check", "2", *settings(shards, tmp_path / "run", f"engine.ds_config={path}"))
    assert "ZeRO stage 3" in err and str(path) in err


def test_unknown_recipe(capsys):
    assert "unknown recipe 'crmoe_vit_mikro_fmnist'; did you mean" in refuse(
        capsys, "--recipe", "crmoe_vit_mikro_fmnist"
    )


def test_good_settings_pass_the_check(shards, tmp_path):
    assert cli.main(["pretrain", "--check", "2", *settings(shards, tmp_path / "run")]) == 0


def test_options_of_the_data_are_settings(shards, tmp_path, monkeypatch):
    from moe_cl import pretrain

    seen = []
    monkeypatch.setattr(pretrain, "pretrain", lambda cfg, me: seen.append(cfg) or 0)
    words = ["--retry-seconds", "7", "--max-bad-fraction", "0.5", "--max-pixels", "1000", "--log-sample-ids"]
    assert cli.main(["pretrain", *settings(shards, tmp_path / "run", "moe.ep_size=1"), *words]) == 0
    data = seen[0].data
    assert (data.retry_seconds, data.max_bad_fraction, data.max_pixels, data.log_sample_ids) == (7.0, 0.5, 1000, True)


def test_ranks_that_do_not_fit_end_before_they_meet(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "moe.ep_size 2 does not divide the 3 ranks" in refuse(
        capsys, *settings(shards, tmp_path, "batch.global_batch=18")
    )


def test_help_is_fast_and_names_every_verb():
    begin = time.process_time()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "moe_cl", "--help"], cwd=ROOT, env=ENV,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and time.process_time() - begin < 5
    assert all(verb in done.stdout for verb in cli.VERBS)
    assert "torch" not in {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}


def test_no_verb_and_unknown_verb(capsys):
    for argv in ([], ["pretrian"]):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 2
