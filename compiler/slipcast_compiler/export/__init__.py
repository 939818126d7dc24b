"""A component and its weights to ONNX, with what is evaluated beforehand: timesteps and prompts."""
