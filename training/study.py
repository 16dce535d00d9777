# SPDX-License-Identifier: Apache-2.0
"""Two studies of trained checkpoints: query banks, and what each expert does.

python training/study.py banks --help
python training/study.py experts --help
"""

import sys

from data.errors import UserError
from engine import bank_study, expert_study
from engine.recipe import exit_on_user_error, parse_options


STUDIES = {"banks": bank_study, "experts": expert_study}


def main():
    name, *words = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in STUDIES:
        raise UserError(f"name the study, one of {', '.join(STUDIES)}, and its options; --help explains them")
    else:
        study = STUDIES[name]
        study.run(parse_options(study.StudyOptions, words, study.__doc__))


if __name__ == "__main__":
    exit_on_user_error(main)
