# SPDX-License-Identifier: Apache-2.0
"""The retrieval metric and the ranks behind it; see README.md."""
