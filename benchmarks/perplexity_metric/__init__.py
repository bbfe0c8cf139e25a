"""A metric for `evaluate`: this folder is what `evaluate.load` takes."""
