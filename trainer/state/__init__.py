"""The state of a run, its checkpoints, and resuming from them.

train_state.py is what an update changes. checkpoint.py says what a checkpoint holds, where it lies and how it is read;
writer.py writes it in the background. resume.py has everything about resuming. checkpoint_settings.py compares the
settings and versions in a file with the present ones.
"""
