"""Datasets on disk: the manifest, the index of each split, the bytes of each sample, and what is done about damage."""
