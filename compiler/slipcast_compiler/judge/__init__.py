"""How far pictures are from the original: metrics, evaluation, the gate."""
