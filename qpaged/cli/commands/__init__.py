"""The commands, one module each.

A module has the command's name, and a function ``add(subparsers)`` that adds its parser. The parser's default
``run`` is a function that takes the parsed arguments and returns the exit status.

To add a command, add a module.
"""
