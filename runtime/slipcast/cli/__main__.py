"""`python -m slipcast.cli`."""

from slipcast.cli.main import main

main()
