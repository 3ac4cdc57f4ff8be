"""`python -m tracedbg`."""

import sys

from tracedbg.cli import main

sys.exit(main())
