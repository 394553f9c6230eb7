"""``python -m moe_cl``."""

import sys

from moe_cl.cli import main

sys.exit(main())
