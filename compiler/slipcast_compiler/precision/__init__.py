"""INT8 and half precision: what is quantised or cast, found by measuring."""
