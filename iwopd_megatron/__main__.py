from iwopd_megatron.cli.main import main

main()
