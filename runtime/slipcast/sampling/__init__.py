"""Samplers, schedules, guidance and seeds: arithmetic on arrays, numpy or torch."""
