"""Files that models come from: files of weights, and folders that also describe their model."""
