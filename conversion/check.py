"""The same as `iwopd check`; --help says how."""

import sys

from iwopd_megatron.cli.main import main

sys.argv.insert(1, "check")
main()
