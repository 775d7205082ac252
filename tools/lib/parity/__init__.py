"""The parts of tools/parity.py.

stages.py holds each stage of an image's way to timm, timm_reference.py runs timm's own transforms with the plan's random
numbers, and rows.py compares pixels.
"""
