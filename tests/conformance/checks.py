"""Which check runs on which file (glob of its name; the first that fits)."""

from tests.conformance import experts, losses, steps

CHECKS = {**experts.CHECKS, **losses.CHECKS, **steps.CHECKS}
