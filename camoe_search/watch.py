# SPDX-License-Identifier: Apache-2.0
"""`camoe index --watch`: wait until something happens in folders.

The package watchfiles asks the operating system (inotify, FSEvents, …), and polls where WATCHFILES_FORCE_POLLING is
set, as network shares need it. Without the package, folders are looked at every half minute.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence

from .files import is_inside


logger = logging.getLogger(__name__)

# A file is written for a while: what follows within this time belongs to the same change.
QUIET_SECONDS = 2.0
POLL_SECONDS = 30.0


def changes(folders: Sequence[str], index: str | os.PathLike | None = None) -> Iterator[None]:
    """Yields when something in the folders may have changed, for ever; what is written into `index` does not count."""
    own = None if index is None else os.path.realpath(index)
    try:
        import watchfiles
    except ImportError:
        logger.warning("watchfiles is not installed: looking every %d seconds", POLL_SECONDS)
        while True:
            time.sleep(POLL_SECONDS)
            yield
    # What changed before the watcher had started shows at its first timeout.
    options = {"step": int(1000 * QUIET_SECONDS), "debounce": 60_000, "raise_interrupt": True}
    has_looked = False
    for found in watchfiles.watch(*folders, **options, rust_timeout=1000, yield_on_timeout=True):
        if not has_looked or any(own is None or not is_inside(os.path.realpath(path), own) for _, path in found):
            has_looked = True
            yield
