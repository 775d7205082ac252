"""The sources of images: image folders, ImageNet's own tars, Kaggle's copy, parquet files, tars of another writer.

A source lists its samples once, in an order that depends on nothing but the data, and reads any of them by the location
that the listing holds. Listing never holds more than one class (or one file) in memory. `open_source` recognises the
kind of a source; source.py has the types that all kinds share, contents.py looks into folders, and tars.py into tars.
webdataset.py is for tars that are indexed where they lie, and no kind of `open_source`.
"""

from tools.lib.shards.sources.recognise import KINDS, open_source
from tools.lib.shards.sources.source import RECOGNISE, Entry, Source, SourceOptions, Unused

__all__ = ["KINDS", "RECOGNISE", "Entry", "Source", "SourceOptions", "Unused", "open_source"]
