"""The torsh-text command."""


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit("torsh-text needs its command-line extra: pip install 'torsh-text[cli]'") from None
    subcommand_cli_from_dict({}, prog="torsh-text")


if __name__ == "__main__":
    main()
