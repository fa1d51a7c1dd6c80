from iwopd_megatron.cli import main

main()
