"""Who may know whom (an arrow of the design is an import): read from the sources, so that it stays true."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "moe_cl"
GROUND = {
    "arguments",
    "comm",
    "config",
    "counting",
    "rng",
    "spans",
    "typed",
}  # imported by all, importing nothing of ours but each other
# package: the project's packages it may import at module level or inside functions, the ground apart
MAY = {
    "losses": {"losses"},
    "moe": {"moe"},
    "models": {"models", "moe"},
    "methods": {"methods", "losses", "models", "moe", "views"},
    "views": {"views"},
    "data": {"data", "views"},
    "tracking": {"tracking"},
}


def imports(path):
    """(line, top-level module, full module) of every import of a file that runs (annotations' own are left out)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


@pytest.mark.parametrize("package", MAY)
def test_nothing_points_back_up(package):
    wrong = []
    for path in (ROOT / package).rglob("*.py"):
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] == "moe_cl" and len(parts) > 1 and parts[1] not in MAY[package] | GROUND | {"__version__"}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_the_ground_stands_by_itself():
    for name in GROUND:
        for line, module in imports(ROOT / f"{name}.py"):
            parts = module.split(".")
            known = parts[0] != "moe_cl" or len(parts) == 1 or parts[1] in GROUND | {"__version__"}
            assert known, f"{name}.py:{line} imports {module}"


def test_only_engine_and_the_layer_name_deepspeed_and_only_they_and_comm_torch_distributed():
    wrong = []
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT).as_posix()
        inside = place.startswith("engine/") or place == "moe/layer.py"
        for line, module in imports(path):
            if module.split(".")[0] == "deepspeed" and not inside:
                wrong.append(f"{place}:{line} {module}")
            if module.startswith("torch.distributed") and not inside and place != "comm.py":
                wrong.append(f"{place}:{line} {module}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_too_long():
    long = {
        p.relative_to(ROOT).as_posix(): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long
