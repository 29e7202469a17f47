"""From a command line and its YAML file to a request."""
