"""Where a run of a bundle spends its time and memory: per component, sampling step and engine layer.

`clock` times runs, `measure` makes them, `component` asks a process of its own for the memory of each component,
`document` adds up, `table` and `page` show it. `memory` says what this process has.
"""
