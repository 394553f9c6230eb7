"""Which check runs on which file (glob of its name; the first that fits)."""

from tests.conformance import esvit, experts, keymaps, losses, steps

CHECKS = {**esvit.CHECKS, **experts.CHECKS, **keymaps.CHECKS, **losses.CHECKS, **steps.CHECKS}
