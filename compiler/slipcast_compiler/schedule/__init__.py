"""When the denoiser is evaluated, and how much of it: timesteps, caching, early exit."""
