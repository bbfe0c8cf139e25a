"""Short programs to copy from. Run from a checkout, for example `python -m examples.generate`."""
