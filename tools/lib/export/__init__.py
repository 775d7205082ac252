"""Parts of tools/export.py: the folder that timm loads, the program of torch.export, and the model card."""
