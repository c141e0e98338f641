"""The public names: people and scripts rely on them, so none may be lost. New names are welcome."""

# ruff: noqa: E501

import inspect

import typer.main

import fusehsm
from fusehsm.cli import app

# Parameters by command: arguments, options and switches.
COMMANDS = {
    "conform": "workloads --json --record --engine --list",
    "doctor": "path --json",
    "evict": "paths --older-than --free",
    "fetch": "store destination --backend --block-size --read-ahead --jobs --deadline --on-error --limit-rate --max-size --record --prefetch -o --events --engine --allow-other --log-file --cache --event-timeout --direct",
    "mount": "source destination -f --foreground -o --abi --events --engine --handler --handler-path --unattended --event-timeout --allow-other --cache --log-file --direct --lifeline",
    "pin": "paths",
    "populate": "store destination --dry-run",
    "run": "command --mount --abi --events --keep --accessor",
    "status": "path --json --release",
    "trace": "path --mask --mark --deny --match --json --backend --count --abi",
    "umount": "destination",
    "unpin": "paths",
    "validate": "store destination --reads --seed --jobs --by --timeout --json",
}

NAMES = "ACCESS_PERM Event Group OPEN_EXEC_PERM OPEN_PERM PRE_ACCESS __version__ drop leased open_group serve"

# Attributes of the classes.
ATTRIBUTES = {
    "Event": "count dialect fd mask names offset path pid",
    "Group": "answer backing checked_errno close event_path fileno mark offer read take_events wait_readable write",
}

# Parameters of the functions.
PARAMETERS = {
    "open_group": "path mask backend dialect flags event_f_flags mark",
    "serve": "group handler limit exits",
    "leased": "path",
    "drop": "path",
}


def test_commands_and_their_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, parameters in COMMANDS.items():
        found = {
            word
            for parameter in commands[name].params
            for word in (*parameter.opts, *parameter.secondary_opts)
        }
        assert not set(parameters.split()) - found, name


def test_names_of_the_package() -> None:
    assert not set(NAMES.split()) - set(fusehsm.__all__)
    assert all(hasattr(fusehsm, name) for name in fusehsm.__all__)


def test_attributes_of_the_classes() -> None:
    for name, attributes in ATTRIBUTES.items():
        assert not set(attributes.split()) - set(dir(getattr(fusehsm, name))), name


def test_parameters_of_the_functions() -> None:
    for name, parameters in PARAMETERS.items():
        assert not set(parameters.split()) - set(inspect.signature(getattr(fusehsm, name)).parameters), name
