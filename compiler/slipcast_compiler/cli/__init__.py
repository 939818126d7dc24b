"""The compiler's commands, one file each; `slipcast` finds them through the entry-point group slipcast.commands."""
