"""The command line of a request: read back through the program it is an equal request."""

import dataclasses
import inspect
import shlex
from pathlib import Path
from typing import Any

import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from pcr_export.cli import app, export
from pcr_export.request import ExportRequest

NOT_OF_THE_REQUEST = ("dry_run", "verbose")
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "str": WORDS,
    "str | None": st.none() | WORDS,
    "int": st.integers(-(10**6), 10**6),
    "int | None": st.none() | st.integers(-(10**6), 10**6),
    "float": st.floats(allow_nan=False),
    "float | None": st.none() | st.floats(allow_nan=False),
    "bool": st.booleans(),
    "Path": WORDS.map(Path),
    "Path | None": st.none() | WORDS.map(Path),
    "list[str] | None": st.none() | st.lists(WORDS, min_size=1, max_size=3),
}
FIELDS = dataclasses.fields(ExportRequest)


def parse(command: str) -> ExportRequest:
    """The request that the program reads from a command line."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("pcr-export", "export")
    context = typer.main.get_command(app).commands[name].make_context(name, words)  # type: ignore[attr-defined]
    return ExportRequest(**{key: value for key, value in context.params.items() if key not in NOT_OF_THE_REQUEST})


def same(request: ExportRequest) -> dict[str, Any]:
    """Its values; a list that was not given is none, whatever the parser makes of it."""
    return {name: value or None if name in ("skip", "lora") else value for name, value in vars(request).items()}


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({each.name: VALUES[str(each.type)] for each in FIELDS}))
def test_a_command_is_read_back_as_its_request(values: dict[str, Any]) -> None:
    request = ExportRequest(**values)
    assert same(parse(request.command())) == same(request)


def test_what_is_not_said_is_the_default_of_the_program() -> None:
    assert ExportRequest(model="sdxl").command() == "pcr-export export sdxl"
    assert same(parse("pcr-export export sdxl")) == same(ExportRequest(model="sdxl"))
    known = {each.name: each.default for each in FIELDS if each.name != "model"}
    parameters = inspect.signature(export).parameters
    assert known == {name: parameters[name].default for name in known}


def test_the_command_that_rebuilds_an_engine_names_everything_that_made_it() -> None:
    request = ExportRequest(
        model="my pipeline",
        backend="tensorrt-rtx",
        target="sm89",
        steps=30,
        relax="last:20%",
        weights="gptq",
        bits="w4a8",
        scheme="static",
        prompts_file=Path("my prompts.txt"),
        skip=["a.*", "auto:2"],
        affine=False,
        validate=False,
        seed=3,
    )
    assert request.engines().rebuild_command == request.command()
    assert request.command() == (
        "pcr-export export --bits w4a8 --steps 30 --backend tensorrt-rtx --target sm89 --prompts-file 'my prompts.txt' "
        "--scheme static --symmetric --relax last:20% --weights gptq --skip 'a.*' --skip auto:2 --seed 3 --no-validate "
        "'my pipeline'"
    )
