"""The command line of ftload: parses, shows and exits; all work is done in `ftload.loaders`."""
