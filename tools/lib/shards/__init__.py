"""The parts of tools/shard_imagenet.py, in the order in which they build on each other:

images.py (one image), tars.py (reading tars), sources.py (where images come from), shards.py (one shard), job.py (all
shards, crash-safe), reindex.py (existing tars), verify.py (is it still what was written).
"""
