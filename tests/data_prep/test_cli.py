"""The command: help of every verb, fast, and its exit codes."""

import subprocess
import sys

import pytest

from data_prep.cli import VERBS, main
from tests.data_prep.images import image_folder


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0 and "--" in capsys.readouterr().out


def test_help_and_version_import_nothing_heavy():
    code = "import sys; from data_prep.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'PIL', 'cv2', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]") and all(verb in done.stdout for verb in VERBS)


def test_sharding_does_not_import_torch(tmp_path):
    """A start of torch costs seconds, and keeps the workers from being forked."""
    args = ["shard", str(image_folder(tmp_path / "images")), "--out", str(tmp_path / "out"), "--workers", "1"]
    code = f"import sys; from data_prep.cli import main\nmain({args!r})\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


def test_no_verb_is_exit_code_2():
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["shrad"], "invalid choice: 'shrad'"),
        (["shard", "images"], "arguments are required: --out"),
        (["shard", "images", "--out", "x", "--workers", "0"], "a whole number of at least 1 is needed, found '0'"),
        (["shard", "images", "--out", "x", "--max-count", "many"], "a whole number of at least 1 is needed"),
        (["shard", "images", "--out", "x", "--shuffle-seed", "-1"], "a whole number of at least 0"),
        (["shard", "images", "--out", "x", "--resize-shorter", "0"], "a whole number of at least 1"),
        (["lint", "x", "--nothing"], "unrecognized arguments: --nothing"),
        (["stats", "x", "--seed", "-1"], "a whole number of at least 0"),
        (["subset"], "arguments are required"),
        (["index"], "arguments are required"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(argv, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    err = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "\n" not in err and err.startswith("error: ") and says in err and "--help" in err
