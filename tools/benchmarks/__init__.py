"""The parts of tools/benchmark.py: a file for each subcommand, and what they share: measure.py (timing, the machine),
runs.py (what is trained) and tables.py (what is printed)."""
