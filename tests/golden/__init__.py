"""What must not change from one version of the code to the next, as it was measured once.

`step-00000006.pt` is a checkpoint of 2026-11-29: every later version must read it and resume from it. `settings.yaml`
is the whole configuration with its defaults, `options.json` lists the options of every command: what is there must
stay. `bits.json` holds the sha256 of the weights after a short run and of rendered pixels, with the software and the
processor that made them, for others may round otherwise.

`python tests/golden` measures all but the checkpoint again and writes it. A change that has to do that says why.
"""
