"""Full, attention-only and linearised fine-tuning compared on real weights (arXiv 2407.07089)."""
