"""Passes: rewrites of a component on its way from checkpoint to engine."""
