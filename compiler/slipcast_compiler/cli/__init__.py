"""The compiler's commands, one file each; `slipcast` finds them through the entry-point group slipcast.commands.

A command has a parameter for each of its options, as click wants it.
"""
