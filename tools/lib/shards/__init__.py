"""The parts of tools/shard_imagenet.py, which makes datasets; each file builds on those before it.

images.py (one image), sources/ (where images come from), shard.py (one shard), manifest_builder.py (index, audit and
manifest from the records of all shards), listing.py and conversion.py (an unfinished conversion on the disk), build.py
(all shards, safe against crashes), reindex.py (existing tars), verify.py (whether everything is as it was written), and
summary.py (a description for people).
"""
