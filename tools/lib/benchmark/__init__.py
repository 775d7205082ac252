"""The parts of tools/benchmark.py and tools/doctor.py.

A file for each of the benchmark's subcommands, and what they share: measure.py (timing, the machine), runs.py and
processes.py (what is trained, here or as a user starts it), tables.py (what is printed). Of the doctor: stages.py
measures, diagnosis.py concludes, proposals.py tries other settings.
"""
