"""Filling a batch sample by sample gives what collating at the end gives."""

import numpy as np
import pytest
import torch

from moe_cl.config import ViewsConfig
from moe_cl.data.rows import Rows
from moe_cl.views.augment import make_views
from moe_cl.views.spec import build_spec, collate
from tests.data.shards import picture


@pytest.mark.parametrize("implementation", ["fast", "device"])
def test_same_as_collate(implementation):
    cfg = ViewsConfig(spec="esvit", size=24, local_size=16, local_number=3, implementation=implementation)
    spec, rows, samples = build_spec(cfg), Rows(5), []
    for i in range(5):
        samples.append(make_views(np.ascontiguousarray(picture(i, 40)), spec, 0, 0, i))
        rows.add(*samples[-1])
    for found, expected in zip(rows.finish(), collate(samples), strict=True):
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == y.dtype and x.is_contiguous() and torch.equal(x, y)
