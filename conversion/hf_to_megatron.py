"""The same as `iwopd convert`; --help says how."""

import sys

from iwopd_megatron.cli import main

sys.argv.insert(1, "convert")
main()
