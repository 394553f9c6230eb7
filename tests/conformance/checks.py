"""The checks of all parts, by the name of the published file each is for."""

from tests.conformance import (
    consistency,
    crmoe_step,
    curves,
    distillation,
    esvit,
    gates,
    keymaps,
    losses,
    matching,
    steps,
    swin,
)

PARTS = (consistency, crmoe_step, curves, distillation, esvit, gates, keymaps, losses, matching, steps, swin)
CHECKS = {name: check for part in PARTS for name, check in part.CHECKS.items()}
