"""Parts of tools/predict.py: the images that it reads, and the files that it writes."""
