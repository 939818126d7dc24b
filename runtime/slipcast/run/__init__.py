"""From a request to pictures: the pipeline, its loop, residency, tiles, tokenizers and the guard."""
