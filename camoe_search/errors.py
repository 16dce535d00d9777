# SPDX-License-Identifier: Apache-2.0
"""The error that users of search see."""


class SearchError(ValueError):
    """A mistake that the user can fix: one line that says what is wrong, why, and what to do."""
