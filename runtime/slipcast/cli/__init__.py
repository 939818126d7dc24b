"""The `slipcast` command: one file per command."""
