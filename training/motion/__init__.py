# SPDX-License-Identifier: Apache-2.0
"""The motion clips: what they show (plan), how they look (scenes) and move (paths), their captions and their files."""
