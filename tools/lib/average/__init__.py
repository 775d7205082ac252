"""Parts of tools/average.py: the checkpoints that it averages."""
