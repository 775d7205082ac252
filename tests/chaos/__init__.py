"""Faults, by chance but repeatable: runs that are broken, and files and settings that are not as they should be.

`python tests/chaos` tries all of them (`make chaos`); tests/chaos/test_chaos.py tries a few of each.
"""
