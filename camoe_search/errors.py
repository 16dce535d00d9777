# SPDX-License-Identifier: Apache-2.0
"""The one error that a user of search meets."""


class SearchError(ValueError):
    """What the user can mend: one line that names the thing, the cause and the remedy."""
