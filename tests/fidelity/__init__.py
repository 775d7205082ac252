"""The trainer against the authors' own code: timm 0.5.4, which they pin, and their repository where a clone is given.

`python tests/fidelity` runs all oracles, `make fidelity` installs timm 0.5.4 before it. That timm cannot be imported
beside the installed one, so its side runs in processes of its own (the folder theirs/), and arrays go between them.
"""
