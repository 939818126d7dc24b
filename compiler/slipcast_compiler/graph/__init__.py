"""ONNX graphs: binding times, tidying, broadcast, cost, casts, quantised operators."""
