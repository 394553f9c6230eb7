"""Views finished on an accelerator are the ones the CPU finishes."""

import pytest
import torch

from moe_cl.config import ViewsConfig
from moe_cl.views.spec import build_spec
from tests.views.test_device import UNITS, finished

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")]


@pytest.mark.parametrize("name", ["mocov1", "mocov3", "esvit"])
def test_accelerator_gives_the_cpus_views(name):
    spec = build_spec(ViewsConfig(spec=name))
    for a, b in zip(finished(spec, "cuda")[0], finished(spec, "cpu")[0], strict=True):
        assert ((a - b).abs().mean(dim=(1, 2, 3)) * UNITS).max() < 0.1
