"""The torsh-optim command."""


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit("torsh-optim needs its command-line extra: pip install 'torsh-optim[cli]'") from None
    subcommand_cli_from_dict({}, prog="torsh-optim")


if __name__ == "__main__":
    main()
