"""How each side draws. worker.py loads these files by path, under the interpreter that has the side's libraries.

A file has `open_side(job)`, which returns a `draw(prompts, seeds)` that returns (pictures float32 [n, h, w, c] in
[0, 1], seconds by component or None); and `describe()`, facts for the document that are known after loading.
"""
