"""How somebody installs an extra of relayd, as messages say it: relayd is published in no package index."""


def install_command(extra: str) -> str:
    """The commands that install `extra`, in one line: from a checkout of relayd, or from its wheel file."""
    from importlib.metadata import version  # only a command that fails pays for it

    wheel = f"relayd-{version('relayd')}-py3-none-any.whl"
    return f"pip install '.[{extra}]' in a checkout of relayd, or pip install './{wheel}[{extra}]'"
