# SPDX-License-Identifier: Apache-2.0
"""Options: defaults, then the recipe, then the command line; and the errors that wrong ones give."""

from dataclasses import dataclass

import pytest

from data.errors import UserError
from engine.recipe import flat_options, option, parse_options, save_recipe


@dataclass
class Options:
    data: str = option(help="where the data is")
    steps: int = option(10, "steps")
    rate: float = option(0.1, "rate")
    limit: int | None = option(None, "limit")
    mode: str = option("fast", "mode", choices=("fast", "slow"))
    note: str | None = option(None, "note")
    quiet: bool = option(False, "say less")
    model: dict = option({}, "sizes")


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: here\nsteps: 20\nrate: 1e-4\nmodel: {width: 8, tower: {depth: 2, heads: 4}}\n")
    options = parse_options(Options, ["--config", str(recipe), "--steps", "30", "--model.tower.depth", "3", "--quiet"])
    assert options == Options(
        data="here", steps=30, rate=1e-4, quiet=True, model={"width": 8, "tower": {"depth": 3, "heads": 4}}
    )


def test_a_saved_recipe_reproduces_the_options(tmp_path):
    options = Options(data="dört", limit=5, model={"experts": ["fusion"]})
    save_recipe(options, tmp_path / "r.yaml")
    assert parse_options(Options, ["--config", str(tmp_path / "r.yaml")]) == options


def test_numbers_and_words_take_the_type_of_the_field():
    options = parse_options(Options, ["--data=2024", "--rate", "2", "--limit", "null"])
    assert options.data == "2024" and options.rate == 2.0 and isinstance(options.rate, float) and options.limit is None


@pytest.mark.parametrize("text", ["2024_11_26", "12:30", "run #2", "1e3", "yes", "null", "0x10", "a: b", "[x]"])
def test_a_text_is_taken_as_it_stands_from_the_command_line_and_from_a_recipe(tmp_path, text):
    assert parse_options(Options, ["--data", text]).data == text
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f'data: "{text}"\n')
    assert parse_options(Options, ["--config", str(recipe)]).data == text
    if text not in ("run #2", "null", "a: b", "[x]"):  # without quotes these mean something else in YAML
        recipe.write_text(f"data: {text}\n")
        assert parse_options(Options, ["--config", str(recipe)]).data == text


def test_null_is_nothing_only_where_an_option_may_be_nothing(tmp_path):
    assert parse_options(Options, ["--data", "x", "--note", "null"]).note is None
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: x\nnote: null\n")
    assert parse_options(Options, ["--config", str(recipe)]).note is None
    assert parse_options(Options, ["--data", "x", "--note", "10_0"]).note == "10_0"


def test_a_tracker_receives_numbers_and_texts():
    options = Options(data="x", model={"experts": ["fusion"], "tower": {"depth": 2}})
    flat = flat_options(options)
    assert flat["model.experts"] == "['fusion']" and flat["model.tower.depth"] == 2 and flat["limit"] == "None"
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is required: where the data is"),
        (["--data", "x", "--stepps", "3"], "unknown option 'stepps' in the command line, did you mean 'steps'"),
        (["--data", "x", "--steps", "many"], "'steps' must be int, got 'many'"),
        (["--data", "x", "--steps", "2.5"], "'steps' must be int, got 2.5"),
        (["--data", "x", "--mode", "medium"], "'mode' must be one of fast, slow, got 'medium'"),
        (["--data", "x", "--steps.a", "1"], "steps is not a dictionary"),
        (["data"], "options are written --name value"),
        (["--config", "absent.yaml"], "cannot read the recipe absent.yaml: No such file"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_options(Options, arguments)


def test_a_recipe_that_is_not_a_mapping_or_not_yaml_is_an_error(tmp_path):
    recipe = tmp_path / "r.yaml"
    for text, message in (("- a\n- b\n", "must hold `name: value` lines"), ("data: [1", "is not valid YAML")):
        recipe.write_text(text)
        with pytest.raises(UserError, match=message):
            parse_options(Options, ["--config", str(recipe)])


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, ["--help"], description="What it does.")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("What it does.", "--data str", "(required)", "steps (default: 10)", "--limit int|none"):
        assert words in text
