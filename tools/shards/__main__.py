"""The `shards` command: image collections in, WebDataset shards out. Its command line is `cli.py`."""

if __name__ == "__main__":  # worker processes import this file too, and have no use for a command line
    from tools.shards.cli import main

    main()
