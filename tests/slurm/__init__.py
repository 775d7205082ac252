"""SLURM itself: a cluster of one node, for tests of the scripts in tools/slurm."""
