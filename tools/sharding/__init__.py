"""The parts of tools/shard_imagenet.py, in the order in which they build on each other:

images.py (one image), sources.py (where images come from), shards.py (one shard), job.py (all shards, crash-safe),
verify.py (is it still what was written).
"""
