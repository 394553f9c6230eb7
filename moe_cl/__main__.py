"""``python -m moe_cl``."""

import sys

from moe_cl.cli import main
from moe_cl.tracking import redact

# Whatever is printed, by libraries and tracebacks too: logs are read by more people than may know a password.
sys.stdout, sys.stderr = redact.Stream(sys.stdout), redact.Stream(sys.stderr)
sys.exit(main())
