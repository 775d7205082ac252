"""The commands around training: NAME.py is one, lib/NAME has its parts, lib/common what several share."""

import pipelines  # noqa: F401  (It must come before torch: it sets how OpenMP's threads wait.)
