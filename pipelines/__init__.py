"""Offline jobs. They own argv, paths, seeds, logging and TOML; ``python -m pipelines --help`` lists them."""
