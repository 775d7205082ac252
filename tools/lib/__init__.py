"""The parts of the commands: lib/NAME belongs to tools/NAME.py, lib/common to all, lib/shards makes datasets."""
