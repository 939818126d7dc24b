"""What a diffusers pipeline does, recorded as it runs, without weights: see record.py, and docs/architecture.md."""
