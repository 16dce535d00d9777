# SPDX-License-Identifier: Apache-2.0
"""`python -m camoe_search`, so that `accelerate launch -m camoe_search index …` can start several processes."""

from .cli import main


if __name__ == "__main__":
    main()
