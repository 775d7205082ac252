"""What every position of a run sees, as pure functions of (seed, position) in NumPy."""
