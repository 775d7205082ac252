"""The parts of tools/benchmark.py.

Each of its subcommands is a file: loader, decode, step, train, teacher, resume and gpu. They share runs.py and
processes.py (what is trained, here or as a user starts it), photographs.py (the data), and results.py (rows, files and
tables).
"""
