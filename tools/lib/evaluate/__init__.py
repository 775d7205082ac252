"""Parts of tools/evaluate.py: its report, labels of ImageNet-ReaL, and the check that ranks evaluate the same thing."""
