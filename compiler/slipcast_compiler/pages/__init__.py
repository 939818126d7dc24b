"""Pages for people: templates, charts, the report."""
