"""Preloaded by the forkserver, and only there: importing this module imports everything ranks need."""

from rank_process import import_warm_modules

import_warm_modules()
