"""Runs the `shards` command."""

if __name__ == "__main__":  # worker processes import this file too, and they need no command line
    from tools.shards.cli import main

    main()
