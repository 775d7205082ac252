"""One update of the student: step.py is the order of time, and each other file is a part of it.

inputs.py makes what the models see of a batch (mixing.py and mixing_triton.py mix the pixels), loss.py is the USI loss,
batch_norm.py keeps BatchNorm's statistics independent of the split into micro-batches and ranks, optimizer.py has AdamW
and clipping, schedule.py the learning rate and the EMA's decay. precision.py and compiler.py say what `auto` resolves
to, and warm_up.py compiles the update before the first step.
"""
