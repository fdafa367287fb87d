"""How good videos are: VBench, measures without weights, fair comparisons of two settings. See docs/evaluation.md."""
