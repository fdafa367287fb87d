"""Parts of `tools/benchmark/gpu.py`: a file each, with a function that yields rows of a table."""
