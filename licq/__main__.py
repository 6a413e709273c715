"""`python -m licq` is the console script `licq`."""

import sys

from licq.command import main

sys.exit(main())
