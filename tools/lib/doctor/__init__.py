"""The parts of tools/doctor.py.

stages.py names the stages of a run and measures their speeds, input_stages.py and step_stages.py carry them out,
diagnosis.py draws conclusions, proposals.py tries other settings, and output.py puts the findings into words.
"""
