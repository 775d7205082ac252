"""The teacher store: a teacher's outputs for the positions of a plan, recorded once and replayed for every student.

    STORE/store.json                              the header: plan, teacher, codec, precision
    STORE/00000768-00000832.0-1024.safetensors    a piece: steps [768, 832), rows [0, 1024) of each global batch

The augmented dataset is a pure function of the position, mixing included, and so is what a frozen teacher says of it.
codec.py turns logits into bytes and back, header.py says what a store was recorded from, pieces.py writes and reads its
files, store.py reads positions and finds what is missing or damaged, and replay.py gives a run its targets.
"""
