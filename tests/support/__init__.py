"""What several tests share: datasets, processes, a small model, documented commands."""
