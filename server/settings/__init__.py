"""What an operator sets: the configuration file, the command line, the environment."""
