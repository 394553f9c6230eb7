"""The list of DeepSpeed's top-level keys is the installed DeepSpeed's; our own JSONs pass."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from moe_cl.config import ConfigError
from moe_cl.engine import ds_keys
from tests.small import ROOT

SOURCE = Path(importlib.util.find_spec("deepspeed").origin).parent


def test_every_key_is_read_by_the_installed_deepspeed():
    folders = (
        "runtime",
        "comm",
        "monitor",
        "profiling",
        "autotuning",
        "elasticity",
        "compression",
        "inference",
        "datastates",
    )
    text = "".join(p.read_text(errors="replace") for f in folders for p in (SOURCE / f).rglob("*.py"))
    named = set(re.findall(r"""["']([a-z_0-9]+)["']""", text))
    assert not ds_keys.TOP - named


def test_keys_that_deepspeed_reads_by_constant_are_listed():
    """What ``DeepSpeedConfig`` looks up by a constant of runtime/constants.py."""
    text = (SOURCE / "runtime/constants.py").read_text()
    constants = dict(re.findall(r"""^([A-Z_0-9]+) = ["']([a-z_0-9]+)["']""", text, re.M))
    used = set(re.findall(r"get_scalar_param\(param_dict,\s*([A-Z_0-9]+),", (SOURCE / "runtime/config.py").read_text()))
    assert len(used) > 15 and not {constants[name] for name in used if name in constants} - ds_keys.TOP


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_configs_pass(path):
    ds_keys.check(json.loads(path.read_text()), path.name)


def test_a_section_that_is_no_mapping():
    with pytest.raises(ConfigError, match="bf16: expected a mapping, found True"):
        ds_keys.check({"bf16": True}, "x.json")
