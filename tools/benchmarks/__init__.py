"""The parts of tools/benchmark.py: measure.py (timing, the machine), and one file for each subcommand."""
