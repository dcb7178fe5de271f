"""The tools of the command line. Each module here is a command: its presence is all that registers it.

The command has the module's name, with hyphens; the first line of the module's docstring is its help, and the signature and docstring
of the module's `run` are its command line (`cli.signature`). A module imports nothing heavy before `run` is called, so that --help
needs no torch.
"""
