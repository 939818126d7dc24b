"""The checkpoint on disk: tensors, layers, rewrites of weights, and the original in diffusers."""
