"""The parts of tools/parity.py.

stages.py compares each stage of an image's way with timm, timm_reference.py runs timm's own transforms with the plan's
random numbers, and rows.py is one comparison.
"""
