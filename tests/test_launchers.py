"""The scripts: wrong options are one line and exit code 2, before anything is installed, started or written."""

import subprocess

import pytest

from tests.small import ENV, ROOT


def script(*words, env=ENV):
    return subprocess.run(["bash", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "name", sorted(p.name for p in (ROOT / "launchers").glob("*") if p.suffix in (".sh", ".sbatch"))
)
def test_the_shell_can_read_it(name):
    assert script("-n", f"launchers/{name}").returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["launchers/quickstart.sh", "--epoch", "3"], "quickstart: unknown option --epoch (see --help)"),
        (["launchers/quickstart.sh", "--out"], "quickstart: --out needs a value"),
        (["launchers/quickstart.sh", "--data=imagenet"], "--data is fashion-mnist or digits, not 'imagenet'"),
        (["launchers/quickstart.sh", "--data", "imagenet"], "--data is fashion-mnist or digits, not 'imagenet'"),
        (["launchers/local.sh", "2", "--recipe", "crmoe_vit_mikro_fmnist"], "did you mean crmoe_vit_micro_fmnist?"),
        (["launchers/local.sh", "3", "--recipe", "crmoe_vit_micro_fmnist"], "does not divide the 3 ranks"),
        (["launchers/local.sh"], "bash launchers/local.sh N --recipe NAME"),
        (["launchers/multinode.sh", "no-such-file"], "bash launchers/multinode.sh HOSTFILE"),
        (["launchers/multinode.sh", "launchers/hostfile.example", "--recipe", "nope"], "unknown recipe 'nope'"),
        (["launchers/torchrun.sh"], "bash launchers/torchrun.sh --recipe NAME"),
        (["launchers/torchrun.sh", "--recipe", "nope"], "unknown recipe 'nope'"),
    ],
)
def test_wrong_options(words, says):
    done = script(*words)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert "spawned" not in done.stdout


def test_no_compiler_and_no_python_are_one_line(tmp_path):
    for program in ("bash", "dirname", "cat", "sha256sum", "cut", "sed"):
        (tmp_path / program).symlink_to(subprocess.check_output(["which", program], text=True).strip())
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = script("launchers/quickstart.sh", env=bare)
    assert done.returncode == 2 and done.stderr.strip().startswith("no Python 3.11 or newer found")
    (tmp_path / "python3.11").symlink_to(ROOT / ".venv" / "bin" / "python")
    done = script("launchers/quickstart.sh", env=bare)
    assert done.returncode == 2 and done.stderr.strip().startswith("no g++ found")
