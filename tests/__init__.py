# SPDX-License-Identifier: Apache-2.0
"""Behaviour, on tiny inputs that each test makes itself. The folders mirror the rooms of the project."""
