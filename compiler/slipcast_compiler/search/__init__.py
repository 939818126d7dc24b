"""One search over the levers of a recipe: sampling, timesteps, guidance, pruning, precision; see run.py."""
