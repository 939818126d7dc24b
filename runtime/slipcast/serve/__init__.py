"""`slipcast serve`: bundles behind HTTP. Needs slipcast[serve]."""
