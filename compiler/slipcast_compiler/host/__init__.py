"""The machine: the build cache, processes, memory, and publishing a directory in one rename."""
