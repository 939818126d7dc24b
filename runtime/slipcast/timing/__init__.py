"""Where a run of a bundle spends its time and memory: per component, sampling step and engine layer.

`measure` runs, `document` adds up, `memory` asks a process of its own for each component, `table` and `page` show it.
"""
