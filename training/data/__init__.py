# SPDX-License-Identifier: Apache-2.0
"""Captioned clips: reading data sets, batches, caches of frames and features, encoded splits."""
