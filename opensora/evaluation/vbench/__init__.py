"""VBench (Huang et al. 2024, arXiv:2311.17982) and VBench-I2V: prompts, the models that score, what the scores come to.

The benchmark itself is not part of this package: its prompts are read from, and its scorers run in, an installation of
their own (``tools/evaluate/vbench.py``).
"""
