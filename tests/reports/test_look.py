"""``explain.npz`` is of the checkpoint, weights, data and number of images that were asked for, and of this run."""

import argparse
import json

import numpy as np
import pytest
import yaml

from moe_cl import config
from moe_cl.cli import main
from moe_cl.engine.checkpoint.format import MANIFEST, Reader, TensorEntry, read_manifest, write_shard
from moe_cl.reports import arrays, build, cli
from moe_cl.reports.run import Run
from moe_cl.tracking.journal import Journal
from tests.data.servers import http_site
from tests.evals.run_dir import make_run, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def journal_of(out):
    journal = Journal(out / "journal.jsonl")
    journal.step(7, {"loss": 1.0}, "x")
    journal.close()


@pytest.fixture
def run(shards, tmp_path):
    """A run's out dir: journal, and a checkpoint with student and teacher."""
    out = tmp_path / "run"
    cfg = make_run(out)
    cfg.data.train = f"{shards}/train"
    path = out / "checkpoints" / "step-00000007"
    for folder in (out, path):
        config.save(cfg, folder / "config.yaml")
    manifest, tensors, file = read_manifest(path), {}, "student.safetensors"
    for name, value in Reader(path).tree("teacher").items():
        key = f"student/{name}"
        tensors[key] = value * 1.1
        dtype = str(value.dtype).removeprefix("torch.")
        manifest.tensors[key] = TensorEntry(list(value.shape), dtype, [[file, key, 0, value.numel()]])
    manifest.files[file] = write_shard(path / file, tensors)
    (path / MANIFEST).write_text(manifest.dump())
    journal_of(out)
    return out


def test_made_again_when_anything_that_went_in_is_another(run, shards):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)

    def look(*more):
        """(what the file says it is made of, was it made now)"""
        path = run / arrays.NAME
        before = path.stat().st_mtime_ns if path.exists() else None
        cli.look(run, parser.parse_args([str(run), *more]))
        return arrays.origin(path), path.stat().st_mtime_ns != before

    first, _ = look()
    assert first["step"] == 7 and first["data"] == f"{shards}/test" and first["journal"] == Run.load(run).id
    assert look() == (first, False)
    other = "teacher" if first["weights"] == "student" else "student"
    assert look("--weights", other)[0]["weights"] == other
    assert look() == (first, True)  # not the other's figures again
    assert look("--weights", first["weights"]) == (first, False)
    fewer, made = look("--samples", "5")
    found = arrays.read(run / arrays.NAME)
    assert made and len(found["features"]) <= 5 and fewer["images"] == 5
    assert look("--data", f"{shards}/train")[0]["data"] == f"{shards}/train"
    assert look() == (first, True)
    journal_of(run)  # another run in the same out dir that comes to the same step
    assert arrays.of_run(run, Run.load(run).id) == {}
    assert not [p for p in build.figures(Run.load(run)) if p.group == "Embeddings"]  # not the old run's pictures
    again, made = look()
    assert made and again != first
    pictures = [p for p in build.figures(Run.load(run)) if p.group in ("Embeddings", "Router, looked into")]
    said = f"{first['weights'].capitalize()} at step 7, {first['data']}."
    assert len(pictures) > 3 and all(p.caption.endswith(said) for p in pictures)


def test_a_file_of_an_earlier_version_says_nothing(tmp_path):
    arrays.save(tmp_path / arrays.NAME, {"step": np.int64(7)})
    assert arrays.origin(tmp_path / arrays.NAME) == {} and arrays.of_run(tmp_path, "id") == {}
    assert arrays.source({}) == "" and arrays.source({"origin": np.array(json.dumps({"step": 7}))}) == ""


@pytest.mark.parametrize(("end", "code"), [("dataset.json", 401), ("dataset.json", 403), (".tar", 403), ("json", 500)])
def test_data_that_a_server_refuses_are_one_line(run, shards, capsys, end, code):
    """The page is made without the figures that need them; asked for by name, it is a setting to mend."""
    command = ["report", str(run), "--no-track"]
    with http_site(shards) as site:
        site.closed[end] = code
        path = run / "checkpoints" / "step-00000007" / "config.yaml"
        tree = yaml.safe_load(path.read_text())
        tree["eval"]["test"], tree["data"]["retry_seconds"] = f"{site.url}/test", 0.0
        path.write_text(yaml.safe_dump(tree))
        assert main(command) == 0
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "figures of the encoder are left out" in said and str(code) in said
        assert (run / "report.html").exists() and not (run / arrays.NAME).exists()
        assert main([*command, "--data", f"{site.url}/test"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("moe_cl: ") and str(code) in said
