"""The helpers of the default suite are found here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
