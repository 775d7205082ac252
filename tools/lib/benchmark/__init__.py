"""The parts of tools/benchmark.py.

Each of its subcommands is a file: loader, step, train, replay and gpu. They share runs.py (what is trained),
photographs.py (the data), and results.py (rows, files and tables).
"""
