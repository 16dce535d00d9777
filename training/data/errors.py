# SPDX-License-Identifier: Apache-2.0
"""The one error that the programs in training/ answer with a line and exit code 2 instead of a traceback."""


class UserError(Exception):
    """A mistake in what the user gave. The message names the thing, the cause and the remedy."""
