"""The command ``opensora`` and what its commands do; the files in ``scripts/`` are the same code."""
