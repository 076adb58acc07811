"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654): its prompts, numbers and scoring, exact lengths."""
