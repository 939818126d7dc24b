"""What is trusted, and when: the manifest, the reader, tensor and ONNX files, validation."""
