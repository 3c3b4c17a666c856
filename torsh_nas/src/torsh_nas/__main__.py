"""The torsh-nas command."""


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit("torsh-nas needs its command-line extra: pip install 'torsh-nas[cli]'") from None
    subcommand_cli_from_dict({}, prog="torsh-nas")


if __name__ == "__main__":
    main()
