"""What a denoiser does on calibration prompts, measured."""
