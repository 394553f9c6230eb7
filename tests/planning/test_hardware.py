"""Cards by name, and figures that were measured."""

import json

import pytest
import torch

from moe_cl.config import ConfigError
from moe_cl.planning import calibrate, hardware


def test_names():
    assert hardware.find("H100-80G").memory == 80e9 and hardware.find("H100") is hardware.find("H100-80G")
    with pytest.raises(ConfigError, match="--gpu H300: no figures of it; take V100-16G, .*calibrate FILE"):
        hardware.find("H300")
    for gpu in hardware.GPUS.values():
        assert "data sheet" in gpu.source and gpu.low["matmul"] > gpu.full["matmul"] and gpu.stream < 4e12


def test_measured(tmp_path):
    threads = torch.get_num_threads()
    found = calibrate.measure(0.01, links=False)
    assert torch.get_num_threads() == threads
    assert set(found.low) == set(found.full) == {"matmul", "batched", "conv", "attention"}
    assert all(rate > 1e8 for rates in (found.low, found.full) for rate in rates.values())
    assert 1e8 < found.stream < 1e13 and 1e-8 < found.launch < 1e-2 and 1e-4 < found.image < 1
    path = tmp_path / "here.json"
    hardware.write(found, path)
    assert hardware.find(str(path)) == found


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        hardware.find(str(path))
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(ConfigError, match="attention|full.*missing or unknown"):
        hardware.find(str(path))


@pytest.mark.processes
def test_links():
    found = calibrate._links()
    assert found["link"] > 1e6 and 0 < found["latency"] < 1
