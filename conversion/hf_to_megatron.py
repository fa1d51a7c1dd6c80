"""The same as `iwopd convert`; --help says how."""

import sys

from iwopd_megatron.cli.main import main

sys.argv.insert(1, "convert")
main()
