"""Images, models and records for all benchmarks."""
