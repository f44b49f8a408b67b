"""How the tests of the command line call it."""

import json

from hiprune_kernels import cli


def prune_json(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["prune", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *arguments):
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:  # argparse exits
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n") and "Traceback" not in printed.err
    return printed.err
