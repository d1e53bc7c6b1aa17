"""Does dropping help: training, comparing, reporting."""
