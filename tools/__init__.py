"""The commands around training, `python tools/NAME.py`; lib/NAME has its parts, lib/common what several share."""

import pipelines  # noqa: F401  (before torch: it sets how OpenMP's threads wait)
