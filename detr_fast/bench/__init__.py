"""What the files in ``benchmarks/results/`` say: a page, the README's tables, two runs side by side."""
