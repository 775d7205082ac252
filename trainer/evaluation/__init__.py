"""Trained models: `trained` opens one, `predict` applies it to a split, `metrics` has what an evaluation measures."""
