"""The same as `iwopd export`; --help says how."""

import sys

from iwopd_megatron.cli.main import main

sys.argv.insert(1, "export")
main()
