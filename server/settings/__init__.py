"""The operator's settings: the configuration file, the command line, the environment."""
