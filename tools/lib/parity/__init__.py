"""The parts of tools/parity.py: rows.py (what is held to what), timm_reference.py (timm's own transforms, told what to
draw), stages.py (each stage of a training image's way).
"""
