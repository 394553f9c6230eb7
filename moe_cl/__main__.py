"""``python -m moe_cl``."""

import sys

from moe_cl.cli import main
from moe_cl.tracking import redact

# Whatever is printed, by libraries and tracebacks too: logs are read by more people than may know a password. What the
# environment calls a password stays in: where it is a common word, tables and JSON would lose that word.
sys.stdout, sys.stderr = redact.Stream(sys.stdout, redact.urls), redact.Stream(sys.stderr, redact.urls)
sys.exit(main())
