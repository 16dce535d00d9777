# SPDX-License-Identifier: Apache-2.0
"""Captioned clips: reading data sets, batches, frame and feature caches, encoded splits."""
