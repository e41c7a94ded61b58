"""Command line options as dataclasses, with one sentence per error."""

import contextlib
import difflib
import io
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, get_type_hints

from common import UserError


def parse_options(default: Any, arguments: list[str], prog: str, description: str = "") -> Any:
    """`tyro.cli` with one sentence per error in place of its boxes.

    Args:
        default: dataclass instance with the values of options that are not set.
        arguments: what follows the name of the program.
        prog: name of the program, and of its command if it has several.
        description: first lines of --help; the docstring of the type of `default` if empty.

    Returns:
        An instance of the type of `default`.

    Raises:
        UserError: unknown option, missing value, or a value of another type or out of range.
    """
    import tyro  # not at the top: configurations that are built in Python do not need it

    # tyro writes the negation of a nested switch as --eval.no-baselines; accept --no-eval.baselines as well
    arguments = [re.sub(r"^--no-([\w-]+)\.", r"--\1.no-", argument) for argument in arguments]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options, unknown = tyro.cli(
                type(default),
                prog=prog,
                description=description or type(default).__doc__,
                default=default,
                args=arguments,
                return_unknown_args=True,
            )
    except SystemExit as stopped:
        if not stopped.code:  # --help
            raise
        # a box with a title, the reason, a rule and the option's help; drawn in ASCII, or colored, as the terminal is
        parts = re.split("─{2,}|-{8,}", re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", "", printed.getvalue()))
        reason = " ".join("".join(parts[1:2] or parts).split())
        reason = plain((reason[:1].upper() + reason[1:]).replace(". Expected", "; expected").rstrip("."))
        if choice := re.match(r"Invalid choice '(.*?)' .*expected one of \((.*)\)", reason):
            reason += nearest(choice[1], re.findall(r"'(.*?)'", choice[2]))
        raise UserError(f"{reason}; see {prog} --help.") from None
    if unknown:
        option = unknown[0].split("=")[0]
        if not option.startswith("-"):
            raise UserError(f"{option!r} is neither an option nor the value of one; see {prog} --help.")
        fields = get_type_hints(type(default), include_extras=True).items()
        bare = [name for name, of in fields if tyro.conf.Positional in getattr(of, "__metadata__", ())]
        if option.lstrip("-") in bare:
            raise UserError(f"{option} is given without its name: {prog} {option.lstrip('-').upper()}.")
        hint = nearest(option, option_names({k: v for k, v in asdict(default).items() if k not in bare}))
        raise UserError(f"There is no option {option!r}{hint}; see {prog} --help.")
    return options


def plain(reason: str) -> str:
    """tyro's reason in words that do not assume Python."""
    reason = reason.replace("expected 1 values", "expected 1 value")
    if number := re.match(r"Error parsing (\S+): (invalid literal for int|could not convert).*?: '(.*)'$", reason):
        kind = "a whole number" if "int" in number[2] else "a number"
        return f"{number[1]} is {number[3]!r}; it must be {kind}"
    failed = r"(?:Could not find valid parse for arguments:|no type matching .*? could be instantiated from)"
    if values := re.match(rf"Error parsing (\S+): {failed} \[(.*?)\](?:$|\. Got errors)", reason):
        hint = " (arguments that belong to no option go before it)" if "," in values[2] else ""
        return f"{values[1]} can't be {values[2]}{hint}"
    return reason


def option_names(options: dict[str, Any], prefix: str = "") -> list[str]:
    """Every option of a configuration as it is typed, switches in both forms."""
    names = []
    for field, value in options.items():
        if isinstance(value, dict):
            names += option_names(value, f"{prefix}{field}.")
        else:
            options_of_field = [f"{prefix}{field}"] + ([f"{prefix}no_{field}"] if isinstance(value, bool) else [])
            names += ["--" + option.replace("_", "-") for option in options_of_field]
    return names


def as_arguments(options: dict[str, Any], prefix: str = "") -> list[str]:
    """Command line that sets every option of a configuration as `dataclasses.asdict` returns it."""
    arguments = []
    for field, value in options.items():
        option = f"{prefix}{field}".replace("_", "-")
        if isinstance(value, dict):
            arguments += as_arguments(value, f"{prefix}{field}.")
        elif isinstance(value, bool):
            arguments.append(f"--{option}" if value else "--" + re.sub(r"([\w-]+)$", r"no-\1", option))
        elif isinstance(value, list | tuple):
            arguments += [f"--{option}", *map(str, value)]
        else:
            arguments.append(f"--{option}={value}")
    return arguments


def nearest(name: str, names: Iterable[str]) -> str:
    """Hint at the valid name that is most similar to a mistyped one, such as " (did you mean --optim.lr?)", or ""."""
    names, bare = {other.lstrip("-"): other for other in names}, name.lower().lstrip("-")
    # --lr for --optim.lr; --encoder for --encoder.name, the first option of its group
    within = [other for other in names if other.rpartition(".")[2] == bare or other.startswith(f"{bare}.")]
    found = within or difflib.get_close_matches(bare, names, n=1)  # without dashes, which all options share
    return f" (did you mean {names[found[0]]}?)" if found else ""
