"""Stands in front of PyTorch in processes that do without it.

webdataset imports PyTorch where it finds it, which takes seconds. Conversions need webdataset alone.
"""

raise ModuleNotFoundError("PyTorch is left out here")
