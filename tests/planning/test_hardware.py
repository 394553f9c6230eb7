"""Cards by name, and figures that were measured."""

import dataclasses
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


@pytest.mark.parametrize(
    ("name", "sms", "per_clock", "ghz", "bits", "gbit"),
    [
        # multiprocessors, 16-bit multiply-adds of each a clock without sparsity, boost clock, memory bus and its rate
        ("V100-32G", 80, 512, 1.530, 4096, 1.752),
        ("A100-40G", 108, 1024, 1.410, 5120, 2.43),
        ("A100-80G", 108, 1024, 1.410, 5120, 3.186),
        ("H100-80G", 132, 2048, 1.830, 5120, 5.235),
        ("H200-141G", 132, 2048, 1.830, 6144, 6.25),
        ("L40S-48G", 142, 512, 2.490, 384, 18.0),
        ("A10-24G", 72, 512, 1.695, 384, 12.5),
    ],
)
def test_peaks_are_those_of_the_chip_and_dense(name, sms, per_clock, ghz, bits, gbit):
    """The sheets' figures follow from the chips: a peak with sparsity, or one of another variant, would be far off."""
    gpu = hardware.find(name)
    assert gpu.low["matmul"] / hardware.PRODUCT == pytest.approx(2 * sms * per_clock * ghz * 1e9, rel=0.02)
    assert gpu.stream / hardware.STREAM == pytest.approx(bits / 8 * gbit * 1e9, rel=0.02)


def test_a_link_counts_in_one_direction():
    """NVLinks of a card x GB/s a direction; 16 lanes of PCIe gen 4 at 16 GT/s."""
    links = {"V100-16G": 6 * 25, "A100-80G": 12 * 25, "H100-80G": 18 * 25, "H200-141G": 18 * 25}
    for name, speed in {**links, "L40S-48G": 16 * 16 / 8, "A10-24G": 16 * 16 / 8}.items():
        assert hardware.find(name).link / hardware.LINK == pytest.approx(speed * 1e9)


def test_convolutions_in_fp32_run_as_tf32_where_the_card_has_it():
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    for gpu in hardware.GPUS.values():
        assert (gpu.full["conv"] > gpu.full["matmul"]) == ("bf16" in gpu.types)


def test_measured(tmp_path):
    threads = torch.get_num_threads()
    found = calibrate.measure(0.01, links=False, rounds=1)
    assert torch.get_num_threads() == threads
    assert set(found.low) == set(found.full) == {"matmul", "batched", "conv", "attention", "experts"}
    assert all(rate > 1e8 for rates in (found.low, found.full) for rate in rates.values())
    assert 0 <= found.fresh < 1e-7 and 1e8 < found.stream < 1e13
    assert 1e-8 < found.launch < 1e-2 and 1e-4 < found.image < 1
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


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("memory", "80", "memory is a number above 0, found "),
        ("memory", 10**400, "memory is a number above 0"),
        ("stream", 0, "stream is a number above 0, found 0"),
        ("network", None, "network is a number above 0, found null"),
        ("link", -1, "link is a number above 0, found -1"),
        ("latency", -1e-6, "latency is a number of at least 0"),
        ("image", float("nan"), "image is a number above 0, found NaN"),
        ("reserve", 1e15, "reserve leaves nothing of memory"),
        ("low", {}, "low is FLOP/s above 0 of matmul, batched, conv, attention, experts, found {}"),
        ("full", dict.fromkeys(hardware.KINDS, 1.0) | {"conv": 0}, "full is FLOP/s above 0"),
        ("types", [], "types is a list of bf16, fp16 or both"),
        ("gpu", 1, "gpu is true or false"),
        ("name", 5, "name is a text"),
    ],
)
def test_a_file_with_a_wrong_value(tmp_path, key, value, says):
    path = tmp_path / "x.json"
    tree = dataclasses.asdict(hardware.GPUS["H100-80G"]) | {key: value}
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
        hardware.find(str(path))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; name a file that can be written"):
        hardware.write(hardware.GPUS["H100-80G"], tmp_path / "nowhere" / "x.json")


@pytest.mark.processes
def test_links():
    found = calibrate._links()
    assert found["link"] > 1e6 and 0 < found["latency"] < 1
