"""`python -m flaxmodels VERB` is `flaxmodels VERB`."""

import sys

from flaxmodels.cli import main

sys.exit(main())
