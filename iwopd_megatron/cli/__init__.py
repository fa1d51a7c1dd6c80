"""The `iwopd` command: every file parses one family of commands, calls a room and prints.

In comes a command line; out go text, files and an exit code. `main` assembles the command,
`worker` is what each process of a world that a command starts runs. No other room imports this
one.
"""

__all__ = ["main"]
