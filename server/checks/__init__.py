"""What is found out about a configuration before anything is loaded."""
