"""Slipcast's compiler: diffusers checkpoint and prompt family in, bundle out. See compile.py."""
