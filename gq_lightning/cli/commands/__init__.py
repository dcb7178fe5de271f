"""The tools of the command line. Each module of this package is a command; no other registration is needed.

The command has the module's name, with hyphens. The first line of the module's docstring is its help, and the signature and docstring
of the module's `run` define its command line (`cli.signature`). A module imports heavy libraries inside `run`, so that --help needs no
torch.
"""
