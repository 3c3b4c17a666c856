"""The torsh-dist command."""


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit(
            "torsh-dist needs its command-line extra: pip install 'torsh-dist[cli]'"
        ) from None
    subcommand_cli_from_dict({}, prog="torsh-dist")


if __name__ == "__main__":
    main()
