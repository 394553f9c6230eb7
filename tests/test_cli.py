"""Bad input: one clear line on stderr, exit code 2, before any rank starts."""

import json
import shutil
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
        ("schedule.epochs=.nan", "schedule.epochs nan must be a finite number"),
        ("schedule.epochs=-1", "schedule.epochs -1.0 must be above 0"),
        ("teacher.momentum=2", "teacher.momentum 2.0 lies between 0 and 1"),
        ("optim.betas=[0.9]", "optim.betas [0.9] takes 2 numbers, found 1"),
        ("optim.base_lr=.inf", "optim.base_lr inf must be a finite number"),
        ("params.temperature=0", "params.temperature 0.0 must be above 0"),
        ("params.dim=-8", "params.dim -8 must be at least 1"),
        ("model.drop_path=2", "model.drop_path 2.0 must be at least 0 and below 1"),
        ("model.options.depth=0", "model.options.depth 0 must be at least 1"),
        ("model.options.heads=-2", "model.options.heads -2 must be at least 1"),
        ("model.options.patch_size=0", "model.options.patch_size 0 must be at least 1"),
        ("model.options.pos_embed=none", "is not one of sincos, learned"),
        ("data.prefetch=-1", "data.prefetch -1 must be at least 0"),
        ("data.repeat=[0]", "data.repeat[0] 0 must be at least 1"),
        ("seed=-1", "seed -1 must be at least 0"),
        ("views.size=20", "views (views.size, views.local_size) of 20 x 20 px cannot be cut into patches of 8"),
        ("engine.statistics=foo", "engine.statistics: 'foo' is not global, published or 'group: N'"),
        ("engine.statistics='group: 5'", "groups of 5 images do not divide the 16 of a micro-batch"),
        ("engine.statistics=group: 5", "groups of 5 images do not divide the 16 of a micro-batch"),
        ("engine.statistics={group: 5}", "groups of 5 images do not divide the 16 of a micro-batch"),
        ("engine.statistics={group: [5]}", "engine.statistics: expected str, found {'group': [5]}"),
        ("moe.hidden_ratio=0.01", "moe.hidden_ratio 0.01 of the width 16 gives experts without a hidden unit"),
        ("model.options.mlp_ratio=0.01", "mlp_ratio gives an MLP without a hidden unit at width 16"),
        ("model.init_from=nowhere.pt", "model.init_from=nowhere.pt: no such file or directory"),
        ("model.init_from=moe_cl", "model.init_from=moe_cl: no complete checkpoint there"),
        ("model.init_from=README.md", "README.md: no"),
        ("engine.profile=[9, 3]", "engine.profile [9, 3] takes two steps"),
        ("params.tempature=1", "unknown key params.tempature; did you mean temperature?"),
        ("method=crmo", "did you mean crmoe?"),
        ("model.backbone=vti", "unknown backbone 'vti'; did you mean vit?"),
        ("model.options={depht: 2}", "has no option 'depht'; did you mean depth?"),
        ("views.spec=mocov4", "views.spec: unknown 'mocov4'"),
        ("eval.knn_every=1", "needs eval.bank"),
        ("track.uri=ftp://x", "is no MLflow address"),
        ("batch.global_batch=512", "less than one global batch of 512"),
        ("data.streams=97", "data.streams 97 is more than the 96 samples of"),
        ("data.cache_dir=/proc/x", "data.cache_dir /proc/x cannot be written (/proc:"),
        ("data.cache_dir=README.md", "data.cache_dir README.md is a file; name a directory"),
        ("batch.exact_large_batch=true & model.backbone=resnet18 & method=mocov3 & model.options={} & moe.blocks=none "
         "& moe.ep_size=1", "needs a backbone without batch norm"),
        ("method=moco & moe.blocks=none & moe.ep_size=1 & params={queue: 8}",
         "params.queue=8 is smaller than the 16 keys of a step"),
        ("method=moco & moe.blocks=none & moe.ep_size=1 & params={queue: 64, bn_groups: 3} & model.backbone=resnet18 "
         "& model.options={}", "params.bn_groups=3 does not divide the 8 images of a rank's micro-batch"),
    ],
)  # fmt: skip
def test_refused_before_any_rank_starts(shards, tmp_path, capsys, change, says):
    changes = change.split(" & ")
    out = tmp_path / "run"
    assert says in refuse(capsys, "--check", "2", *settings(shards, out, *changes))
    assert not out.exists()


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("/proc/nowhere/run", "--out /proc/nowhere/run cannot be written (/proc:"),
        ("README.md", "--out README.md is a file; name a directory"),
        ("README.md/run", "--out README.md/run cannot be written (README.md: it is a file)"),
    ],
)
def test_an_out_dir_that_cannot_be(shards, tmp_path, capsys, place, says):
    assert says in refuse(capsys, "--check", "2", *settings(shards, tmp_path / "run"), "--out", place)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["out="], "--out is empty; name a directory"),
        (["--out", ""], "--out is empty; name a directory"),
        (["--out="], "--out is empty; name a directory"),
        (["out=null"], "out: expected str, found None"),
    ],
)
def test_an_empty_out_dir(shards, tmp_path, capsys, words, says):
    _, _, _, _, *rest = given = settings(shards, tmp_path / "run")
    assert given[2] == "--out"
    assert says in refuse(capsys, "--check", "2", *given[:2], *rest, *words)


def test_empty_folder(tmp_path, capsys):
    assert "has neither dataset.json nor a .tar" in refuse(
        capsys, "--check", "2", *settings(tmp_path, tmp_path / "run")
    )


def test_zero_3_with_experts(shards, tmp_path, capsys):
    path = tmp_path / "zero3.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    err = refuse(capsys, "--check", "2", *settings(shards, tmp_path / "run", f"engine.ds_config={path}"))
    assert "ZeRO stage 3" in err and str(path) in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimization": {"stage": 1, "overlap_com": true}}', "no key overlap_com; did you mean overlap_comm?"),
        ('{"zero_optimisation": {"stage": 1}}', "no key zero_optimisation; did you mean zero_optimization?"),
        ('{"zero_optimization": {"stage": "one"}}', "zero_optimization.stage: "),
        ('{"zero_optimization": {"reduce_bucket_size": -5}}', "zero_optimization.reduce_bucket_size -5 must be"),
        ('{"torch_autocast": {"enabled": false, "dtyp": "bfloat16"}}', "torch_autocast.dtyp; did you mean dtype?"),
        ('{"torch_autocast": {"dtype": "bfloat16"}}', 'torch_autocast.enabled is true, false or "auto", found none;'),
        ('{"torch_autocast": {"enabled": "yes"}}', "found 'yes'; write it, or remove the section"),
        ('{"steps_per_print": "often"}', "steps_per_print: expected int, found 'often'"),
        ('{"steps_per_print": 0}', "steps_per_print 0 must be at least 1"),
        ('{"wall_clock_breakdown": "yes"}', "wall_clock_breakdown: expected bool, found 'yes'"),
        ('{"communication_data_type": "fp8"}', "communication_data_type: 'fp8' is not one of fp32, fp16, bf16"),
        ('{"gradient_allreduce_op": "sum"}', "gradient_allreduce_op: 'sum' is not one of mean"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}',
         "zero_optimization.offload_optimizer is not supported"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "nvme", "nvme_path": "/x"}}}',
         "zero_optimization.offload_param is not supported"),
        ('{"zero_optimization": {"stage": 2, "cpu_offload": true}}', "zero_optimization.cpu_offload is not supported"),
        ('{"steps_per_print": 5, "steps_per_print": 6}', "steps_per_print stands there twice; remove one of them"),
        ("[1]", "is a mapping"),
    ],
)  # fmt: skip
def test_deepspeed_json_is_held_against_deepspeed(shards, tmp_path, capsys, text, says):
    path = tmp_path / "ds.json"
    path.write_text(text)
    err = refuse(capsys, "--check", "2", *settings(shards, tmp_path / "run", f"engine.ds_config={path}"))
    assert says in err and str(path) in err


def test_a_deepspeed_json_may_say_that_nothing_is_offloaded(shards, tmp_path):
    path = tmp_path / "ds.json"
    offload = {"offload_optimizer": {"device": "none"}, "offload_param": None}
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, **offload}, "steps_per_print": None}))
    given = settings(shards, tmp_path / "run", f"engine.ds_config={path}")
    assert cli.main(["pretrain", "--check", "2", *given]) == 0


def test_more_neighbours_than_the_bank_has_images(shards, tmp_path, capsys):
    given = settings(shards, tmp_path / "run", f"eval.bank={shards}", f"eval.test={shards}", "eval.knn_every=1")
    err = refuse(capsys, "--check", "2", *given, "eval.k=97")
    assert f"eval.k 97 is more than the 96 images of eval.bank {shards}; lower it" in err
    assert cli.main(["pretrain", "--check", "2", *given, "eval.k=96"]) == 0


def test_a_cache_dir_is_not_made_by_the_check(shards, tmp_path):
    given = settings(shards, tmp_path / "run", f"data.cache_dir={tmp_path}/cache/remote", "data.workers=0")
    assert cli.main(["pretrain", "--check", "2", *given]) == 0 and not (tmp_path / "cache").exists()


def test_recipe_files_that_are_none(tmp_path, capsys):
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    assert "not a YAML text file" in refuse(capsys, "--recipe", str(tmp_path / "bytes.yaml"))
    (tmp_path / "list.yaml").write_text("base: [1]\n")
    assert "base is the name or path of one recipe, found [1]" in refuse(
        capsys, "--recipe", str(tmp_path / "list.yaml")
    )
    for name, base in (("a", "b"), ("b", "a"), ("self", "self")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {tmp_path / base}.yaml\n")
    for name in ("a", "self"):
        assert "is its own base" in refuse(capsys, "--recipe", str(tmp_path / f"{name}.yaml"))


def test_a_folder_of_splits_is_asked_for_its_training_split(shards, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "both")
    tree = json.loads((tmp_path / "both" / "dataset.json").read_text())
    tree["splits"] = {"test": tree["splits"]["train"], **tree["splits"]}
    (tmp_path / "both" / "dataset.json").write_text(json.dumps(tree))
    err = refuse(capsys, "--check", "2", *settings(tmp_path / "both", tmp_path / "run"))
    assert f"write {tmp_path / 'both'}/train" in err


@pytest.mark.parametrize(
    "argv",
    [
        [], ["pretrian"], ["pretrain"], ["pretrain", "--recipe"], ["pretrain", "--nothing"], ["eval"], ["eval", "kn"],
        ["eval", "knn"], ["report"], ["report", "--samples", "x", "out"], ["track"], ["track", "sync"],
        ["checkpoint", "lits"], ["export"], ["import", "--nothing"], ["doctor", "--port", "x"], ["recipes", "--x"],
        ["pretrain", "--recipe", "x", "--check", "0"], ["pretrain", "--recipe", "x", "--check", "-1"],
        ["pretrain", "--recipe", "x", "--check", "two"], ["eval", "knn", "--checkpoint", "x", "--k", "0"],
        ["eval", "linear", "--checkpoint", "x", "--held-out", "1"],
        ["eval", "knn", "--checkpoint", "x", "--batch", "0"],
        ["eval", "finetune", "--checkpoint", "x", "--fraction", "nan"],
        ["track", "sync", "x", "--seconds", "-1"],
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_read_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    err = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in err and err.startswith("moe_cl: ") and "--help" in err


def test_no_run_is_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and "no journal.jsonl there" in err


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
    zero = ["--retry-seconds", "0", "--max-bad-fraction", "0"]
    assert cli.main(["pretrain", *settings(shards, tmp_path / "run", "moe.ep_size=1"), *zero]) == 0
    assert (seen[1].data.retry_seconds, seen[1].data.max_bad_fraction) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("words", "uri"), [(["--track-uri", "http://host:5000"], "http://host:5000"), (["--track", "none"], "none")]
)
def test_where_tracking_goes_is_an_option(shards, tmp_path, monkeypatch, words, uri):
    from moe_cl import pretrain

    seen = []
    monkeypatch.setattr(pretrain, "pretrain", lambda cfg, me: seen.append(cfg) or 0)
    given = [word for word in settings(shards, tmp_path / "run", "moe.ep_size=1") if not word.startswith("track.uri")]
    assert cli.main(["pretrain", *given, *words]) == 0
    assert seen[0].track.uri == uri


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
