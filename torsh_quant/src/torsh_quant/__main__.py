"""The torsh-quant command."""


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        raise SystemExit("torsh-quant needs its command-line extra: pip install 'torsh-quant[cli]'") from None
    subcommand_cli_from_dict({}, prog="torsh-quant")


if __name__ == "__main__":
    main()
