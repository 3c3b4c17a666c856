"""The torsh-data command."""


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit(
            "torsh-data needs its command-line extra: pip install 'torsh-data[cli]'"
        ) from None
    subcommand_cli_from_dict({}, prog="torsh-data")


if __name__ == "__main__":
    main()
