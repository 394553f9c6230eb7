"""What a manifest says is checked against itself and the files before a tensor is used, by whoever reads it."""

import argparse
import copy
import json
from pathlib import Path

import pytest
import torch

from moe_cl.config import ConfigError
from moe_cl.engine.checkpoint import cli, latest_complete
from moe_cl.engine.checkpoint.format import MANIFEST, Damaged, Reader, read_manifest, write_bytes
from moe_cl.engine.checkpoint.manifest import digest
from tests.engine.test_faults import flip, run, saved  # noqa: F401 (a fixture)

BIAS, WEIGHT = "backbone.bias", "backbone.weight"


@pytest.fixture
def last(saved):  # noqa: F811
    return saved[0], latest_complete(saved[0])


def edit(path, change, hashed=True):
    """Change a manifest's tree; its own hash is made to fit, as nothing but a hand does, or left as it was."""
    tree = json.loads((path / MANIFEST).read_text())
    change(tree)
    if hashed:
        tree["sha256"] = digest(tree)
    (path / MANIFEST).write_text(json.dumps(tree))


def pieces(tree, name=BIAS):
    return tree["tensors"][f"student/{name}"]["pieces"]


def older(tree):
    """As format version 1 had it."""
    tree["version"] = 1
    tree.pop("sha256")


def test_every_flipped_bit_of_a_manifest_is_seen(last):
    """Not one leads to another checkpoint: it is damaged, of another version, or the very same."""
    _, path = last
    text, same = (path / MANIFEST).read_bytes(), read_manifest(path)
    for at in range(0, len(text), 7):
        for bit in (1, 2, 4):
            changed = bytearray(text)
            changed[at] ^= bit
            (path / MANIFEST).write_bytes(changed)
            try:
                assert read_manifest(path) == same
            except ConfigError:
                pass


def test_a_key_of_another_tensor_and_a_lost_moment_fall_back(last, capsys):
    out, path = last
    text = (path / MANIFEST).read_text()
    where = text.index(BIAS, text.index(f'"student/{BIAS}"') + 20)  # the key of its piece
    swapped = text[:where] + "heads.view.bias" + text[where + len(BIAS) :]
    lost = text.replace(f"optimizer/exp_avg_sq/{BIAS}", "optimizer/exp_avg_sq/backbone.bibs")
    for bad in (swapped, lost):
        assert bad != text
        (path / MANIFEST).write_text(bad)
        assert run(out)[1].load() == {"cursor": 8}
        assert "does not have its own sha256; trying the one before" in capsys.readouterr().err
        path.with_name(f"damaged-{path.name}").rename(path)


CRAFTED = {
    "another file": lambda t: pieces(t)[0].__setitem__(0, "/etc/passwd"),
    "a file above": lambda t: pieces(t)[0].__setitem__(0, "../step-00000001/student-00000.safetensors"),
    "outside": lambda t: t["files"].__setitem__("../../secret", {"bytes": 0, "sha256": ""}),
    "another range": lambda t: pieces(t)[0].__setitem__(3, 3),
    "a range beyond": lambda t: pieces(t)[0].__setitem__(3, 10**15),
    "a piece twice": lambda t: pieces(t).append(list(pieces(t)[0])),
    "half twice": lambda t: t["tensors"][f"student/{BIAS}"].__setitem__(
        "pieces", [[*pieces(t)[0][:2], 0, 2], [*pieces(t)[0][:2], 0, 2]]
    ),
    "no piece": lambda t: pieces(t).clear(),
    "no pieces": lambda t: t["tensors"][f"student/{BIAS}"].__setitem__("pieces", 5),
    "another key": lambda t: pieces(t)[0].__setitem__(1, "nothing"),
    "a moment as weight": lambda t: pieces(t)[0].__setitem__(
        slice(0, 2), ["optimizer-00000.safetensors", f"exp_avg/{BIAS}"]
    ),
    "a piece of two": lambda t: t["tensors"].update({f"method/x/{BIAS}": t["tensors"][f"student/{BIAS}"]}),
    "a longer tensor": lambda t: pieces(t)[0].__setitem__(1, WEIGHT),
    "a function as type": lambda t: t["tensors"][f"student/{BIAS}"].__setitem__("dtype", "load"),
    "another type": lambda t: t["tensors"][f"student/{BIAS}"].__setitem__("dtype", "float16"),
    "a huge shape": lambda t: t["tensors"][f"student/{BIAS}"].__setitem__("shape", [10**15]),
    "a huge tensor": lambda t: t["tensors"][f"student/{BIAS}"].update(
        shape=[10**15], pieces=[[*pieces(t)[0][:2], 0, 10**15]]
    ),
    "a negative shape": lambda t: t["tensors"][f"student/{BIAS}"].__setitem__("shape", [-2, -2]),
    "no tensors": lambda t: t.pop("tensors"),
    "no extra": lambda t: t["files"].pop("extra.json"),
    "a lost moment": lambda t: t["tensors"].pop(f"optimizer/exp_avg/{BIAS}"),
    "no moments": lambda t: [t["tensors"].pop(f"optimizer/{k}/{BIAS}") for k in ("exp_avg", "exp_avg_sq")],
    "another moment": lambda t: t["tensors"].__setitem__(
        "optimizer/exp_avg/backbone.bibs", t["tensors"].pop(f"optimizer/exp_avg/{BIAS}")
    ),
    "no generator": lambda t: t["tensors"].pop("rng/00000/numpy"),
    "a list": lambda t: t.__setitem__("files", []),
    "a word as time": lambda t: t.__setitem__("created", "noon"),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", CRAFTED)
def test_what_cannot_be_falls_back_too(last, kind, version, capsys):
    """A manifest with a hash that fits, or of the version that had none: no traceback and no wrong tensor."""
    out, path = last
    edit(path, CRAFTED[kind])
    if version == 1:
        edit(path, older, hashed=False)
    assert run(out)[1].load() == {"cursor": 8}
    line = capsys.readouterr().err
    assert "step-00000002" in line and "trying the one before" in line and line.count("\n") == 1


def test_state_that_is_not_a_checkpoints_falls_back(last):
    out, path = last
    for name, text in (("extra.json", "{}"), ("optimizer.json", "[1]"), ("extra.json", "[" * 100_000)):
        kept = copy.deepcopy((path / name).read_bytes()), (path / MANIFEST).read_text()
        entry = write_bytes(path / name, [text.encode()])
        edit(path, lambda t, name=name, entry=entry: t["files"].__setitem__(name, vars(entry)))
        assert run(out)[1].load() == {"cursor": 8}
        path.with_name(f"damaged-{path.name}").rename(path)
        (path / name).write_bytes(kept[0])
        (path / MANIFEST).write_text(kept[1])
    assert run(out)[1].load() == {"cursor": 16}


def test_the_older_format_still_loads(last):
    out, path = last
    edit(path, older, hashed=False)
    steps = {name: count for name, count in json.loads((path / "optimizer.json").read_text()).items() if count}
    entry = write_bytes(path / "optimizer.json", [json.dumps(steps).encode()])
    edit(path, lambda t: t["files"].__setitem__("optimizer.json", vars(entry)), hashed=False)
    assert run(out)[1].load() == {"cursor": 16}


def test_a_checkpoint_of_another_choice_of_what_is_trained_is_refused(last, tmp_path):
    out, _ = last
    model, saver = run(out)
    groups = saver.view.inner.param_groups
    for group in groups:
        group["params"] = [p for p in group["params"] if p is not model.backbone.bias]
    saver.view.__init__(model, saver.view.optimizer, saver.comm)
    with pytest.raises(ConfigError, match="trained backbone.bias, which is frozen here"):
        saver.load()
    saver.out = tmp_path / "other"
    saver.save(1, {"cursor": 1}, wait=True)
    with pytest.raises(ConfigError, match="did not train backbone.bias"):
        run(tmp_path / "other")[1].load()


def call(*argv):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args([str(a) for a in argv]))


def test_no_command_uses_a_byte_that_is_not_the_manifests(last, tmp_path):
    out, path = last
    flip(path / "student-00000.safetensors", -2)
    with pytest.raises(Damaged, match="student-00000.safetensors does not have the sha256"):
        Reader(path).tree("student")
    for command in (("convert", out, tmp_path / "w.safetensors"), ("diff", out, out)):
        with pytest.raises(ConfigError, match="student-00000.*take another"):
            call(*command)
    assert not (tmp_path / "w.safetensors").exists()
    (path / MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="is not a checkpoint's; take another"):
        call("diff", out, out)


def test_one_checkpoint_of_another_version_hides_no_other(last, capsys):
    out, path = last
    edit(path, lambda t: t.__setitem__("version", 99))
    assert call("ls", out) == 0
    assert "step-00000001" in (table := capsys.readouterr().out) and "not read" in table
    assert call("verify", out) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("not read: ") and "version 99" in lines[0] and lines[1].startswith("step-00000001: ok")
    _, saver = run(out, keep_best="knn")
    saver.save(3, {"metrics": {"knn": 0.5}}, wait=True)
    assert [event["name"] for event in saver.drain_events()] == ["checkpoint"]


def test_diff_compares_step_counts_cursor_and_scale(last, tmp_path, capsys):
    out, path = last
    model, saver = run(tmp_path / "other")
    saver.load(path)
    saver.save(2, {"cursor": 16, "mlflow_run": "another"}, wait=True)
    assert call("diff", out, tmp_path / "other") == 0 and "all equal" in capsys.readouterr().out
    for state in saver.view.inner.state.values():
        state["step"] += 1
    saver.save(3, {"cursor": 24}, wait=True)
    assert call("diff", out, tmp_path / "other") == 1
    said = capsys.readouterr().out.splitlines()
    assert "extra.json/extra/cursor: 16 and 24" in said and f"optimizer.json/{WEIGHT}: 1.0 and 2.0" in said


@pytest.mark.parametrize("to", ["no/such/dir/x.safetensors", "file/x.safetensors", "folder.safetensors"])
def test_convert_where_nothing_can_be_written(last, tmp_path, to):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ConfigError, match="cannot be written|is a directory"):
        call("convert", last[0], tmp_path / to)


def test_a_full_disk_leaves_no_half_of_a_converted_file(last, tmp_path):
    assert Path("/dev/full").exists()
    (tmp_path / ".x.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="x.safetensors: cannot be written .No space left"):
        call("convert", last[0], tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*x.safetensors*"))


def test_convert_takes_no_teacher_from_deepspeed(tmp_path):
    torch.save({"module": {"a": torch.ones(2)}}, tmp_path / "mp_rank_00_model_states.pt")
    to = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match="DeepSpeed saved one network there, no teacher; leave --what out"):
        call("convert", tmp_path, to, "--what", "teacher")
    assert not to.exists() and call("convert", tmp_path, to) == 0
