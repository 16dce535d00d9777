# SPDX-License-Identifier: Apache-2.0
"""The error that the programs in training/ print as one line, with exit code 2, instead of a traceback."""


class UserError(Exception):
    """A mistake in the user's input. The message names what is wrong, the cause and the remedy."""
