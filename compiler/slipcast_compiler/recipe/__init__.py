"""The recipe: every table, reading it with lines, and the prompt family."""
