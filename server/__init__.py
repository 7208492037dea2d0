"""The HTTP side of Coxswain: OpenAI API, configuration, command line."""
