"""The commands that install an extra, for messages: relayd is not published in a package index."""


def install_command(extra: str) -> str:
    """The commands that install `extra`, in one line: from a checkout of relayd, or from its wheel."""
    from importlib.metadata import version  # imported only when a command fails

    wheel = f"relayd-{version('relayd')}-py3-none-any.whl"
    return f"pip install '.[{extra}]' in a checkout of relayd, or pip install './{wheel}[{extra}]'"
